"""Handing out, collecting and grading, over nbgrader's API. A folder of submissions goes through in one go; one that breaks gets 0
points and a reason, and the others go on.

A course folder is nbgrader's: `source/HW/*.ipynb` and `nbgrader_config.py`; `release`, `submitted`, `autograded`, `feedback` and
`gradebook.db` are made beside them, and `grades/` with what nbgrader does not keep: why, and how long.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat

from course_lib.errors import CourseError, InputError, did_you_mean
from course_lib.files import write_text
from course_lib.homework.online import addresses
from course_lib.homework.seeds import seed_line, seeds_file, student_seed

if TYPE_CHECKING:
    from nbgrader.apps import NbGraderAPI

LARGEST = 20_000_000  # bytes of a notebook that is handed in
TAG = "homework"  # metadata of a released notebook: which cells it must have


def open_course(folder: str | Path) -> NbGraderAPI:
    """nbgrader's API for a course folder, with its nbgrader_config.py.

    Raises:
        InputError: nbgrader is not installed, or the folder is no course folder.
    """
    folder = Path(folder).resolve()
    if not (folder / "source").is_dir():
        raise InputError(f"{folder}: has no folder source/, so it is no course folder; name one with --folder")
    try:
        from nbgrader.apps import NbGraderAPI
    except ImportError:
        raise InputError("nbgrader is not installed: pip install -c constraints.txt -e '.[homework]'") from None
    from traitlets.config.loader import PyFileConfigLoader

    bin_folder = str(Path(sys.executable).parent)  # nbgrader starts `alembic` by its bare name
    if bin_folder not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([bin_folder, os.environ.get("PATH", "")])
    logging.getLogger("traitlets").setLevel(logging.CRITICAL)  # what went wrong comes back in the results
    configured = PyFileConfigLoader("nbgrader_config.py", path=str(folder)).load_config()
    configured.CourseDirectory.root = str(folder)
    return NbGraderAPI(config=configured)


def release(api: NbGraderAPI, assignment: str, students: Sequence[str] = ()) -> Path:
    """Make the notebooks that learners get, without solutions and hidden tests; return their folder.

    With students, each gets a folder of their own under `release-students`, with a seed of their own.

    Raises:
        InputError: no such assignment.
        CourseError: nbgrader refuses the source.
    """
    known = sorted(api.get_source_assignments())
    if assignment not in known:
        raise InputError(
            f"assignment {assignment!r} is unknown: there are {', '.join(known)}{did_you_mean(assignment, known)}"
        )
    _must(api.generate_assignment(assignment), f"{assignment} was not released")
    root = Path(api.coursedir.root)
    folder = root / "release" / assignment
    for path in folder.glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata[TAG] = {"assignment": assignment, "cells": _cells(notebook)}
        nbformat.write(notebook, path)
    if not students:
        seeds_file(root, assignment).unlink(missing_ok=True)
        return folder
    seeds = {student: student_seed(assignment, student) for student in students}
    write_text(seeds_file(root, assignment), json.dumps(seeds, indent=1))
    for student, seed in seeds.items():
        own = root / "release-students" / student / assignment
        shutil.rmtree(own, ignore_errors=True)
        shutil.copytree(folder, own)
        for path in own.glob("*.ipynb"):
            _give_seed(path, seed)
    return root / "release-students"


def collect(api: NbGraderAPI, assignment: str, handed_in: str | Path) -> list[str]:
    """Copy what was handed in to `submitted/`; return the students.

    `handed_in` holds a folder for each student with the notebook in it, or files named STUDENT.ipynb.

    Raises:
        InputError: no such folder, nothing in it, or the assignment was not released.
    """
    root, handed_in = Path(api.coursedir.root), Path(handed_in)
    names = _released(root, assignment)
    if not handed_in.is_dir():
        raise InputError(f"{handed_in}: no such folder; name the one with the submissions")
    students = []
    for path in sorted(handed_in.iterdir()):
        student = path.stem if path.suffix == ".ipynb" else path.name
        inside = [path] if path.suffix == ".ipynb" else sorted(path.rglob("*.ipynb")) if path.is_dir() else []
        if not inside or not _is_name(student):
            continue
        target = root / "submitted" / student / assignment
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            of_name = [one for one in inside if one.name == name]
            chosen = of_name or (inside if len(inside) == len(names) == 1 else [])
            if chosen and not chosen[0].is_symlink():
                shutil.copyfile(chosen[0], target / name)
        write_text(
            target / "timestamp.txt", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(inside[0].stat().st_mtime))
        )
        students.append(student)
    if not students:
        raise InputError(f"{handed_in}: holds no notebooks; expected STUDENT.ipynb, or STUDENT/{names[0]}")
    return students


def to_grade(api: NbGraderAPI, assignment: str, students: Sequence[str] = ()) -> list[str]:
    """The students whose submissions `autograde` takes: all, or those asked for.

    Raises:
        InputError: the assignment was not released, or somebody handed in nothing.
    """
    _released(Path(api.coursedir.root), assignment)
    submitted = sorted(api.get_submitted_students(assignment))
    if missing := sorted(set(students) - set(submitted)):
        there = ", ".join(submitted) or "none"
        raise InputError(f"{', '.join(missing)}: handed in nothing for {assignment}; there are {there}")
    return list(students) or submitted


def submitted_addresses(api: NbGraderAPI, assignment: str) -> dict[str, dict[str, str]]:
    """The students whose submissions name an address of theirs, and which."""
    root, given = Path(api.coursedir.root), {}
    for student in to_grade(api, assignment):
        for path in sorted((root / "submitted" / student / assignment).glob("*.ipynb")):
            if not _unreadable(path) and (found := addresses(nbformat.read(path, as_version=4))):
                given[student] = found
    return given


def autograde(
    api: NbGraderAPI,
    assignment: str,
    students: Sequence[str] = (),
    *,
    done: Callable[[str], None] = lambda student: None,
) -> dict[str, dict[str, Any]]:
    """Grade every submission, or those of some students; return for each what is to be known beside its points.

    Keys: `error` (why it could not be graded, then it has 0 points), `ended` (the limit it hit), `restored` cells, `oddities`,
    `seconds`.
    """
    root, wanted = Path(api.coursedir.root), to_grade(api, assignment, students)
    file = root / "grades" / f"{assignment}.json"
    notes: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for student in wanted:
        notes[student] = _grade_one(api, assignment, student)
        write_text(
            file, json.dumps(notes, indent=1, ensure_ascii=False)
        )  # after each: a run that is stopped keeps what it did
        done(student)
    return notes


def _grade_one(api: NbGraderAPI, assignment: str, student: str) -> dict[str, Any]:
    root, started = Path(api.coursedir.root), time.perf_counter()
    notes: dict[str, Any] = {"error": "", "ended": "", "restored": [], "oddities": []}
    folder = root / "submitted" / student / assignment
    error = next((reason for path in sorted(folder.glob("*.ipynb")) if (reason := _unreadable(path))), "")
    if not error:
        with _quiet():
            result = api.autograde(assignment, student)
        error = "" if result["success"] else f"nbgrader: {_last_line(result)}"
    if error:
        notes["error"] = error
        _give_nothing(api, assignment, student)
    for path in (root / "autograded" / student / assignment).glob("*.ipynb"):
        metadata = nbformat.read(path, as_version=4).metadata.get("course_homework", {})
        notes["ended"] = notes["ended"] or metadata.get("ended", "")
        notes["restored"] += metadata.get("restored", [])
        notes["oddities"] += metadata.get("oddities", [])
    notes["seconds"] = round(time.perf_counter() - started, 1)
    return notes


def feedback(api: NbGraderAPI, assignment: str, students: Sequence[str] = ()) -> list[Path]:
    """Write `feedback/STUDENT/ASSIGNMENT/*.html`, for submissions that could not be graded a page with the reason."""
    root = Path(api.coursedir.root)
    file = root / "grades" / f"{assignment}.json"
    if not file.exists():
        raise InputError(f"{assignment}: nothing is graded yet; run: course homework autograde {assignment}")
    pages = []
    for student, notes in json.loads(file.read_text(encoding="utf-8")).items():
        if students and student not in students:
            continue
        folder = root / "feedback" / student / assignment
        if notes["error"]:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{assignment}.html").write_text(_error_page(assignment, notes["error"]), encoding="utf-8")
        else:
            with _quiet():
                _must(api.generate_feedback(assignment, student), f"{student}: no feedback")
        pages += sorted(folder.glob("*.html"))
    return pages


def _released(root: Path, assignment: str) -> list[str]:
    names = sorted(path.name for path in (root / "release" / assignment).glob("*.ipynb"))
    if not names:
        raise InputError(f"{assignment}: is not released yet; run: course homework release {assignment}")
    return names


def _cells(notebook: nbformat.NotebookNode) -> list[dict[str, Any]]:
    """What `validate` needs to know of a notebook that it sees without the release."""
    cells = []
    for cell in notebook.cells:
        meta = cell.metadata.get("nbgrader")
        if meta:
            cells.append({"id": meta["grade_id"], "type": cell.cell_type, "points": meta.get("points", 0)})
    return cells


def _give_seed(path: Path, seed: int) -> None:
    from nbgrader.utils import compute_checksum

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("grade_id") == "seed":
            cell.source = seed_line(seed)
            cell.metadata.nbgrader["checksum"] = compute_checksum(cell)
    nbformat.write(notebook, path)


def _is_name(student: str) -> bool:
    """Whether nbgrader can take it apart again from a path."""
    return bool(re.fullmatch(r"[\w.@-]+", student)) and not student.startswith(".")


def _unreadable(path: Path) -> str:
    """Why a notebook cannot be read, in plain words; "" where it can."""
    size = path.stat().st_size
    if path.is_symlink():
        return f"{path.name} is a link, not a notebook"
    if size > LARGEST:
        return f"{path.name} has {size / 1e6:.0f} MB, and {LARGEST / 1e6:.0f} MB are the limit; clear its outputs and hand it in again"
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError, nbformat.ValidationError) as error:
        said = str(error).strip().splitlines()
        return f"{path.name} is no notebook: {said[0][:150] if said else type(error).__name__}; save it again in JupyterLab"
    return ""


def _give_nothing(api: NbGraderAPI, assignment: str, student: str) -> None:
    """0 points in the gradebook, and nothing left to be marked by hand."""
    with api.gradebook as gradebook:
        gradebook.update_or_create_student(student)
        submission = gradebook.update_or_create_submission(assignment, student)
        for notebook in submission.notebooks:
            for grade in notebook.grades:
                grade.auto_score, grade.needs_manual_grade = 0, False
        gradebook.db.commit()


def _error_page(assignment: str, reason: str) -> str:
    from html import escape

    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(assignment)}</title>'
        f"<h1>{escape(assignment)}: could not be graded</h1><p>{escape(reason)}</p>"
        "<p>Mend it and hand it in again; <code>course homework validate</code> shows whether it can be read.</p></html>\n"
    )


def _must(result: dict[str, Any], what: str) -> None:
    if not result["success"]:
        raise CourseError(f"{what}: {_last_line(result)}")


def _last_line(result: dict[str, Any]) -> str:
    """The error that nbgrader's own are about."""
    lines = [line.strip() for key in ("error", "log") for line in (result.get(key) or "").splitlines()]
    errors = [
        line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit): ", line) and "NbGraderException" not in line
    ]
    said = errors or [line for line in lines if line]
    return said[-1][:300] if said else "it does not say why"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what kernels and libraries print of themselves while a bar is drawn; not for other threads' sake."""
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
