"""What all checks are made of.

A check takes what the learner made, and returns nothing, or raises `CheckFailed`: what is probably wrong, and the smallest example
that shows it. It never says what the right answer is. The visible cell and the hidden test call the same check; the hidden one
gives a `seed`, and the check draws more cases from it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NoReturn


class CheckFailed(AssertionError):
    """An answer does not hold; the message is the diagnosis."""


def fail(diagnosis: str, example: str = "") -> NoReturn:
    """Raise `CheckFailed` with the diagnosis and an example on a line of its own."""
    raise CheckFailed(f"{diagnosis}\n    example: {example}" if example else diagnosis)


def call(answer: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a learner's function returns; an error inside it becomes a diagnosis with the call.

    NotImplementedError goes through: the exercise is not begun.
    """
    shown = ", ".join(
        [*(short(value) for value in arguments), *(f"{key}={short(value)}" for key, value in options.items())]
    )
    if not callable(answer):
        fail(f"a function is wanted, and this is {type(answer).__name__}")
    try:
        result = answer(*arguments, **options)
    except NotImplementedError:
        raise
    except Exception as error:
        fail(f"your function stopped with {type(error).__name__}: {error}", f"{answer.__name__}({shown})")
    if result is None:
        fail("your function returns nothing: is a return missing?", f"{answer.__name__}({shown})")
    return result


def close(value: Any, wanted: float, *, relative: float = 1e-4, absolute: float = 1e-9) -> bool:
    """Whether a number, or a tensor of one, is `wanted`.

    Raises:
        CheckFailed: it is no number, or is nan.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        fail(f"a number is wanted, and this is {type(value).__name__}", short(value))
    if math.isnan(number):
        fail("the number is nan: something was divided by zero, or a mean was taken of nothing")
    return math.isclose(number, wanted, rel_tol=relative, abs_tol=absolute)


def choose(answer: Any, choices: str) -> str:
    """A letter of a multiple-choice question.

    Raises:
        CheckFailed: it is none of them.
    """
    if answer is ...:
        raise NotImplementedError
    if not isinstance(answer, str) or answer.strip().upper() not in set(choices):
        fail(f"one of the letters {', '.join(choices)} is wanted", short(answer))
    return answer.strip().upper()


def cases(seed: int | None) -> random.Random | None:
    """A source of more cases for the hidden test; None for the visible one."""
    return None if seed is None else random.Random(seed)


def short(value: Any) -> str:
    """A value on one line of at most 100 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."
