"""Equations and systems of them, solved by SymPy in a child process with limited time and memory.

SymPy's own reader (`sympify`) evaluates text as Python; here our parser reads it, and the child builds SymPy's objects from the
tree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from course_lib.agent.expressions import ExpressionError, Tree, parse
from course_lib.agent.isolation import run_child

SECONDS = 10.0
MEMORY = 1024 * 2**20  # bytes of address space; SymPy alone takes a fifth of it
MOST_EQUATIONS = 8
MOST_UNKNOWNS = 8
FUNCTIONS = ("sqrt", "sin", "cos", "tan", "exp", "ln", "log", "abs")
_CONSTANTS = ("pi", "π", "e")


def solve(
    equations: str, unknown: str = "", *, seconds: float = SECONDS, stopped: Callable[[], bool] = lambda: False
) -> str:
    """The solutions, as in "x = 2 or x = 3"; "no solution"; or an expression's unknown where it is 0.

    Args:
        equations: one or more, with `;`, a comma or a line break between them; one without `=` is set equal to 0.
        unknown: what to solve for, several with commas; by default all names that occur (of one equation, `x` or the first).

    Raises:
        ExpressionError: an equation cannot be read, there are too many, or no answer came within the limits.
    """
    texts = [text.strip() for text in re.split(r"[;,\n，；]", equations) if text.strip()]
    if not 1 <= len(texts) <= MOST_EQUATIONS:
        raise ExpressionError(f"{len(texts)} equations; give 1 to {MOST_EQUATIONS}")
    trees = [_equation(text) for text in texts]
    names = list(dict.fromkeys(name for tree in trees for name in _names(tree)))
    if len(names) > MOST_UNKNOWNS:
        raise ExpressionError(f"{len(names)} unknowns; the limit is {MOST_UNKNOWNS}")
    wanted = [name for name in re.split(r"[\s,，]+", unknown) if name]
    if missing := [name for name in wanted if name not in names]:
        raise ExpressionError(
            f"the unknown {missing[0][:40]!r} does not occur; there are: {', '.join(names) or 'none'}"
        )
    if not names:
        raise ExpressionError("there is nothing to solve for: no name such as x occurs")
    if not wanted:
        wanted = names if len(trees) > 1 else ["x"] if "x" in names else names[:1]
    request = {"trees": trees, "unknowns": wanted}
    ended = run_child("equations_child.py", request, seconds=seconds, memory=MEMORY, stopped=stopped)
    if ended.limit or ended.status:
        raise ExpressionError(
            f"no solution was found within the limits ({ended.limit or 'memory, or SymPy cannot solve it'})"
        )
    return str(json.loads(ended.output))


def _equation(text: str) -> Tree:
    left, equals, right = text.partition("=")
    if "=" in right.removeprefix("="):
        raise ExpressionError(f"more than one = in {text[:60]!r}")
    tree = parse(left, functions=FUNCTIONS)
    return ("-", tree, parse(right.removeprefix("="), functions=FUNCTIONS)) if equals else tree


def _names(tree: Tree) -> list[str]:
    kind, *parts = tree
    if kind in ("name", "number"):
        return [parts[0]] if kind == "name" and parts[0] not in _CONSTANTS else []
    inner = parts[1] if kind == "call" else parts
    return [name for part in inner for name in _names(part)]
