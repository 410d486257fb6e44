"""What the `course` fixture of conftest.py gives: a command's exit status and what it wrote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


Course = Callable[..., Result]
