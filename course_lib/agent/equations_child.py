"""Run by `isolation.run_child` in a process of its own: solves equations that were parsed elsewhere.

Standard input: the request of `equations.solve`, trees as lists; output: the answer as JSON text.
"""

from __future__ import annotations

import json
import operator
import sys
from pathlib import Path
from typing import Any

import sympy

sys.path.insert(0, str(Path(__file__).parent))
from lock_down import lock_down  # type: ignore[import-not-found]

del sys.path[0]

_OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": lambda a, b: sympy.floor(a / b),
    "%": sympy.Mod,
    "^": operator.pow,
    "neg": operator.neg,
    "!": sympy.factorial,
}
_FUNCTIONS = {
    **{"sqrt": sympy.sqrt, "sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "exp": sympy.exp, "ln": sympy.log},
    "log": lambda value, base=10: sympy.log(value, base),
    "abs": sympy.Abs,
}
_CONSTANTS = {"pi": sympy.pi, "π": sympy.pi, "e": sympy.E}


def expression(tree: list[Any]) -> Any:
    """SymPy's form of a tree."""
    kind, *parts = tree
    if kind == "number":
        return sympy.Rational(parts[0])
    if kind == "name":
        return _CONSTANTS.get(parts[0]) or sympy.Symbol(parts[0])
    if kind == "call":
        return _FUNCTIONS[parts[0]](*map(expression, parts[1]))
    return _OPERATORS[kind](*map(expression, parts))


def answer(trees: list[list[Any]], unknowns: list[str]) -> str:
    """The solutions in one line."""
    symbols = [sympy.Symbol(name) for name in unknowns]
    equations = [expression(tree) for tree in trees]
    if all(equation == 0 for equation in equations):
        return f"every value of {', '.join(unknowns)} is a solution"
    solutions = sympy.solve(equations, symbols, dict=True)
    if not solutions:
        return "no solution"
    return " or ".join(
        ", ".join(_line(symbol, one[symbol]) for symbol in symbols if symbol in one) for one in solutions
    )


def _line(symbol: Any, value: Any) -> str:
    if value.has(sympy.CRootOf):
        value = value.evalf(12)
    text = str(value).replace("**", "^")
    if value.is_number and not value.is_Rational and value.is_real and not value.has(sympy.Float):
        text += f" (about {value.evalf(8)})"
    return f"{symbol} = {text}"


if __name__ == "__main__":
    request = json.load(sys.stdin)
    limits = {key: request[key] for key in ("memory", "seconds", "file_size")}
    lock_down(str(Path.cwd()), request["readable"], **limits)
    try:
        print(json.dumps(answer(request["trees"], request["unknowns"])))
    except NotImplementedError:
        print(json.dumps("no way to solve this is known to SymPy"))
