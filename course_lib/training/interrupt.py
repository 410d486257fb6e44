"""Ctrl-C and SIGTERM end a run at the next step, with a checkpoint; a second Ctrl-C ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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


@contextmanager
def interrupts_told(work_dir: Path, resume_hint: str) -> Iterator[None]:
    """Let a Ctrl-C outside the steps, or a second one, say how to go on, where there is a checkpoint to go on from.

    Raises:
        Interrupted: Ctrl-C, and a checkpoint is there. Before there is one, the plain KeyboardInterrupt goes on.
    """
    from course_lib.training.checkpoint import (
        checkpoints,
    )  # loads torch, which a command that only reports does not need

    try:
        yield
    except KeyboardInterrupt:
        if not checkpoints(work_dir):
            raise
        raise Interrupted(f"stopped; {resume_hint} (checkpoint in {work_dir})") from None
