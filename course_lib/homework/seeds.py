"""A number of its own for every student: the same exercises, other values, so that answers cannot be handed on.

The seed is a hash of assignment and student, so that a second release gives the same. `grades/ASSIGNMENT.seeds.json` says who has
which; the autograder puts it back into the cell `seed`, which is locked.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def student_seed(assignment: str, student: str) -> int:
    """A number from 1 to 9,999."""
    digest = hashlib.sha256(f"{assignment}\0{student}".encode()).digest()
    return 1 + int.from_bytes(digest[:8], "big") % 9_999


def seed_line(seed: int) -> str:
    """The source of the cell `seed`."""
    return f"SEED = {seed}"


def seeds_file(course: Path, assignment: str) -> Path:
    """Where the seeds of an assignment stand."""
    return course / "grades" / f"{assignment}.seeds.json"
