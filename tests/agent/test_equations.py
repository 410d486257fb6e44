from __future__ import annotations

import time

import pytest

from course_lib.agent.equations import solve
from course_lib.agent.expressions import ExpressionError


@pytest.mark.parametrize(
    ("equations", "unknown", "solutions"),
    [
        ("x^2 - 5x + 6 = 0", "", "x = 2 or x = 3"),
        ("2x + y = 5; x - y = 1", "", "x = 2, y = 1"),
        ("x^2 = 2", "", "x = -sqrt(2) (about -1.4142136) or x = sqrt(2) (about 1.4142136)"),
        ("y = 3x + 1", "x", "x = y/3 - 1/3"),
        ("x = x + 1", "", "no solution"),
        ("x = x", "", "every value of x is a solution"),
        ("0.5x + 0.25 = 1", "", "x = 3/2"),
    ],
)
def test_solutions(equations: str, unknown: str, solutions: str) -> None:
    assert solve(equations, unknown) == solutions


@pytest.mark.parametrize(
    ("equations", "unknown", "says"),
    [
        ("__import__('os').system('x') = 0", "", "no part of arithmetic"),
        ("x = 1 = 2", "", "more than one ="),
        ("x == ", "", "ends where a number"),
        ("2 + 3 = 5", "", "nothing to solve for"),
        ("x = 1", "y", "'y' does not occur"),
        (";".join(["x = 1"] * 9), "", "9 equations; give 1 to 8"),
        ("", "", "0 equations"),
        ("+".join(f"a{n}" for n in range(9)), "", "9 unknowns"),
    ],
)
def test_what_is_no_equation_is_told(equations: str, unknown: str, says: str) -> None:
    with pytest.raises(ExpressionError, match=says):
        solve(equations, unknown)


@pytest.mark.parametrize("equations", ["x = 9^9^9^9", "x^(9^9) + x = 1", "x = 99999999!"])
def test_an_equation_that_never_ends_is_given_up(equations: str) -> None:
    started = time.perf_counter()
    with pytest.raises(ExpressionError, match="within the limits"):
        solve(equations, seconds=1)
    assert time.perf_counter() - started < 5
