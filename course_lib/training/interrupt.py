"""Ctrl-C and SIGTERM end a run at the next step, with a checkpoint; a second Ctrl-C ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from course_lib.errors import CourseError


class Interrupted(CourseError):
    """The run was stopped by Ctrl-C or SIGTERM, and can be resumed."""

    exit_code = 130


@contextmanager
def interrupt_requested() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether a stop was asked for. Outside the main thread signals stay as they are."""
    asked = False

    def ask(signum: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {signum: signal.signal(signum, ask) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
