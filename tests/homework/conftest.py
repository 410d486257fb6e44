"""A course with hw01 released, made once: nbgrader takes seconds for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from assignments import SOURCE


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from course_lib.homework import grading

    folder = tmp_path_factory.mktemp("released")
    shutil.copytree(SOURCE / "hw01", folder / "source" / "hw01")
    shutil.copy(SOURCE.parent / "nbgrader_config.py", folder)
    grading.release(grading.open_course(folder), "hw01", ["ada", "bob"])
    return folder


@pytest.fixture(scope="module")
def folder(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy for the tests of one file."""
    folder = tmp_path_factory.mktemp("course") / "course"
    shutil.copytree(released, folder)
    return folder
