"""The two ways a command fails, and how a wrong name is answered.

Raise where the fact is known and carry the offending value. The command line turns a `CourseError`
into one line on stderr and its `exit_code`; a notebook shows it as an ordinary exception.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CourseError(Exception):
    """The work failed: exit status 1. The message is one line that says what, where, and what to do."""

    exit_code = 1


class InputError(CourseError):
    """The input is wrong: exit status 2."""

    exit_code = 2


def install_extra(extra: str) -> str:
    """How to install what an extra of this project brings, at the versions it is tested with."""
    return f"in the project's folder, pip install -c constraints.txt -e '.[{extra}]'"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Name the nearest known names: `'; did you mean a, b?'`, or `''` when nothing is near."""
    by_lower_case = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), by_lower_case, n=3, cutoff=0.6)
    return f"; did you mean {', '.join(by_lower_case[candidate] for candidate in near)}?" if near else ""
