"""Names for parts of a step's work, which a profile (profile.py) finds in its trace. Without a profile they do nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

from torch.profiler import record_function

PREFIX = "part: "  # before the name, in the trace
STEP = "step"  # the part that all others are in

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_nothing = nullcontext()
_recording = False


def part(name: str) -> AbstractContextManager[object]:
    """What is done while this is entered is part `name`; of parts in one another the inner one counts."""
    return record_function(PREFIX + name) if _recording else _nothing


def part_of(name: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """What a function does is part `name`."""

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @wraps(function)
        def named(*arguments: Arguments.args, **settings: Arguments.kwargs) -> Result:
            if not _recording:
                return function(*arguments, **settings)
            with record_function(PREFIX + name):
                return function(*arguments, **settings)

        return named

    return decorate


@contextmanager
def recorded_parts() -> Iterator[None]:
    """Parts are written into the trace of the profiler that runs."""
    global _recording
    _recording = True
    try:
        yield
    finally:
        _recording = False
