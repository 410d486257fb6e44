"""A calculator: exact with whole numbers and fractions, in floating point where a function or a root needs it.

Numbers have at most `LARGEST_BITS` bits, and a power or a factorial that would have more is refused before it is computed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

from course_lib.agent.expressions import ExpressionError, Tree, parse

LARGEST_BITS = 4000  # about 1,200 decimal digits
_Number = Fraction | float

_CONSTANTS: dict[str, float] = {"pi": math.pi, "π": math.pi, "e": math.e, "tau": math.tau}
_FUNCTIONS: dict[str, tuple[int, Callable[..., float]]] = {  # name -> number of arguments, function
    **{
        name: (1, getattr(math, name))
        for name in (
            "exp",
            "sin",
            "cos",
            "tan",
            "asin",
            "acos",
            "atan",
            "sinh",
            "cosh",
            "tanh",
            "log2",
            "log10",
            "degrees",
            "radians",
            "cbrt",
        )
    },
    "ln": (1, math.log),
    "log": (1, math.log10),
}
_EXACT = ("sqrt", "abs", "round", "floor", "ceil", "min", "max", "gcd", "lcm", "factorial")
FUNCTIONS = (*_FUNCTIONS, *_EXACT)


def calculate(expression: str) -> str:
    """The value of an arithmetic expression, as text: a whole number with all its digits, or 15 significant digits.

    `log` is the logarithm to base 10, `ln` the natural one; angles are in radians; `^` and `**` are powers.

    Raises:
        ExpressionError: it cannot be parsed, has no value (1/0), or one that is too large.
    """
    try:
        return write_number(_value(parse(expression, functions=FUNCTIONS)))
    except ZeroDivisionError:
        raise ExpressionError("division by zero") from None
    except (OverflowError, ValueError, TypeError) as error:
        if isinstance(error, ExpressionError):
            raise
        raise ExpressionError(f"no value: {error}") from None


def write_number(value: _Number) -> str:
    """A number as people write it."""
    if isinstance(value, Fraction):
        if value.denominator == 1:
            return str(value.numerator)
        with localcontext(prec=15):  # a float would have no form for 10^-400
            return f"{Decimal(value.numerator) / Decimal(value.denominator):.15g}".lower()
    if math.isnan(value) or math.isinf(value):
        raise ExpressionError("the value is not a finite number")
    rounded = round(value)
    return (
        str(rounded) if abs(value) < 1e15 and abs(value - rounded) < 1e-12 * max(1.0, abs(value)) else f"{value:.12g}"
    )


def _value(tree: Tree) -> _Number:
    kind, *parts = tree
    if kind == "number":
        return _number(parts[0])
    if kind == "name":
        if parts[0].lower() not in _CONSTANTS:
            raise ExpressionError(f"the name {parts[0]!r} is unknown; known: {', '.join((*_CONSTANTS, *FUNCTIONS))}")
        return _CONSTANTS[parts[0].lower()]
    if kind == "call":
        return _small(_call(parts[0], [_value(part) for part in parts[1]]))
    values = [_value(part) for part in parts]
    if kind == "neg":
        return -values[0]
    if kind == "!":
        return _factorial(values[0])
    return _small(_power(*values) if kind == "^" else _OPERATORS[kind](*values))


_OPERATORS: dict[str, Callable[..., _Number]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
}


def _number(text: str) -> Fraction:
    exponent = text.lower().partition("e")[2]
    if abs(int(exponent or 0)) > 400:
        raise ExpressionError(f"the number {text[:30]} is too large or too small")
    return Fraction(text)


def _small(value: _Number) -> _Number:
    if isinstance(value, int):
        value = Fraction(value)
    if isinstance(value, complex):
        raise ExpressionError("no value: the root of a negative number")
    if isinstance(value, Fraction) and max(value.numerator.bit_length(), value.denominator.bit_length()) > LARGEST_BITS:
        raise ExpressionError(f"the number is too large: more than {int(LARGEST_BITS * math.log10(2))} digits")
    return value


def _power(base: _Number, exponent: _Number) -> _Number:
    whole = isinstance(exponent, Fraction) and exponent.denominator == 1
    if isinstance(base, Fraction) and whole:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        trivial = base in (0, 1, -1)
        if not trivial and bits * abs(exponent.numerator) > LARGEST_BITS + bits:
            raise ExpressionError(f"the power is too large: more than {int(LARGEST_BITS * math.log10(2))} digits")
        return base ** (exponent.numerator % 2 + 2 if trivial and exponent > 2 else exponent.numerator)
    if base < 0:
        raise ExpressionError("no value: the root of a negative number")
    if exponent == Fraction(1, 2):
        return _root(base)
    return float(base) ** float(exponent)


def _root(value: _Number) -> _Number:
    if value < 0:
        raise ExpressionError("no value: the root of a negative number")
    if isinstance(value, Fraction):
        exact = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
        if exact * exact == value:
            return exact
    return math.sqrt(value)


def _factorial(value: _Number) -> Fraction:
    if not isinstance(value, Fraction) or value.denominator != 1 or value < 0:
        raise ExpressionError("factorial takes a whole number from 0 up")
    if value > 450:  # 450! has 3,327 bits
        raise ExpressionError("the factorial is too large")
    return Fraction(math.factorial(value.numerator))


def _call(name: str, values: list[_Number]) -> _Number:
    if name in ("min", "max"):
        return (min if name == "min" else max)(values)
    if name in ("gcd", "lcm"):
        if any(not isinstance(value, Fraction) or value.denominator != 1 for value in values):
            raise ExpressionError(f"{name} takes whole numbers")
        return Fraction(getattr(math, name)(*(int(value) for value in values)))
    if name == "round" and len(values) == 2:
        if abs(values[1]) > 100:
            raise ExpressionError("round takes at most 100 digits")
        return round(values[0], int(values[1]))
    if name == "log" and len(values) == 2:
        return math.log(values[0], values[1])
    wanted = _FUNCTIONS[name][0] if name in _FUNCTIONS else 1
    if len(values) != wanted:
        raise ExpressionError(f"{name} takes {wanted} value, not {len(values)}")
    value = values[0]
    if name in _FUNCTIONS:
        return _FUNCTIONS[name][1](float(value))
    if name == "sqrt":
        return _root(value)
    if name == "factorial":
        return _factorial(value)
    return Fraction({"abs": abs, "round": round, "floor": math.floor, "ceil": math.ceil}[name](value))
