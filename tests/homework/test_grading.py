"""Hand out, collect, grade: nbgrader end to end, with honest, careless and hostile submissions."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from assignments import SOURCE, nbgrader
from course_runner import Course
from submissions import answered, solution_lines

pytest.importorskip("nbgrader")
from course_lib.homework import grading
from course_lib.homework.report import Grades, grades, write_csv

CONTAINED = "from course_lib.homework.checks import fail\n"
SLOW = 3  # seconds a cell may take here


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A course with hw01 released."""
    folder = tmp_path_factory.mktemp("course")
    shutil.copytree(SOURCE / "hw01", folder / "source" / "hw01")
    config = (SOURCE.parent / "nbgrader_config.py").read_text()
    config += f"\nc.Contained.timeout = {SLOW}\nc.Contained.total_timeout = 30\nc.Contained.folder_size = 20_000_000\n"
    (folder / "nbgrader_config.py").write_text(config)
    grading.release(grading.open_course(folder), "hw01")
    return folder


def release_of(folder: Path) -> nbformat.NotebookNode:
    return nbformat.read(folder / "release" / "hw01" / "hw01.ipynb", as_version=4)


def test_the_release_has_no_solution_and_no_hidden_test(folder: Path) -> None:
    text = "\n".join(cell.source for cell in release_of(folder).cells)
    assert "BEGIN" not in text
    assert "seed=" not in text
    assert text.count("raise NotImplementedError()") == 6
    lines = solution_lines("hw01")
    assert len(lines) > 15
    assert not [line for line in lines if line in text]


@pytest.fixture(scope="module")
def graded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Grades]:
    """A class hands in; everything is graded in one go."""
    handed_in, outside = tmp_path_factory.mktemp("handed_in"), folder / "precious.txt"
    outside.write_text("untouched")
    release = folder / "release" / "hw01"
    whole = answered(release, "hw01")

    def hand_in(student: str, notebook: nbformat.NotebookNode) -> None:
        nbformat.write(notebook, handed_in / f"{student}.ipynb")

    def edited(change: Any) -> nbformat.NotebookNode:
        notebook = answered(release, "hw01")
        change({nbgrader(cell).get("grade_id"): cell for cell in notebook.cells}, notebook)
        return notebook

    hand_in("solution", whole)
    hand_in("untouched", release_of(folder))
    hand_in(
        "half", answered(release, "hw01", wrong={"loss": "def loss(logits, labels):\n    return 0.0", "cut": "x = 1"})
    )
    hand_in(
        "stderr",
        answered(release, "hw01", first="import sys, warnings\nprint('x', file=sys.stderr)\nwarnings.warn('y')"),
    )
    (handed_in / "broken.ipynb").write_text('{"cells": [', encoding="utf-8")
    hand_in(
        "deleted",
        edited(
            lambda cells, notebook: [
                notebook.cells.remove(cells[name]) for name in ("loss-test", "labels", "labels-test", "why-it-rambles")
            ]
        ),
    )
    wrong = {"loss": "def loss(logits, labels):\n    return 0.0"}
    hostile = answered(release, "hw01", wrong=wrong)
    for cell in hostile.cells:
        if nbgrader(cell).get("grade_id") == "loss-test":
            cell.source = "pass"
    hand_in("edits", hostile)
    disguised = answered(release, "hw01", wrong=wrong)
    for cell in disguised.cells:
        if nbgrader(cell).get("grade_id") == "loss-test":
            cell.metadata["nbgrader"].update(grade=False, locked=False, points=1)
            cell.cell_type = "markdown"
            del cell["outputs"], cell["execution_count"]
    hand_in("disguises", disguised)
    patch = "from course_lib.homework import checks_01\nfor n in ('loss', 'labels'): setattr(checks_01, n, lambda *a, **k: None)\n"
    patch += "get_ipython().input_transformers_cleanup.append(lambda lines: ['pass'])"
    hand_in("patches", answered(release, "hw01", wrong=wrong, first=patch))
    deletes = f"import shutil, os\nfor p in ({str(folder)!r}, os.path.expanduser('~')):\n    shutil.rmtree(p, ignore_errors=True)\nopen({str(outside)!r}, 'w')"
    hand_in("deletes", answered(release, "hw01", first=deletes))
    reads = f"text = open({str(folder / 'source' / 'hw01' / 'hw01.ipynb')!r}).read()\nprint('GOT' + text)"
    hand_in("reads", answered(release, "hw01", first=reads))
    hand_in("forks", answered(release, "hw01", first="import os\nwhile True:\n    os.fork()"))
    hand_in("sleeps", answered(release, "hw01", first="import time\ntime.sleep(1000)"))
    hand_in("prints", answered(release, "hw01", first="for _ in range(1000):\n    print('x' * 10**6)"))
    hand_in(
        "fills", answered(release, "hw01", first="for i in range(1000):\n    open(str(i), 'wb').write(bytes(10**7))")
    )
    hand_in(
        "connects", answered(release, "hw01", first="import socket\nsocket.create_connection(('127.0.0.1', 80), 1)")
    )
    hand_in("exits", answered(release, "hw01", first="import os\nos._exit(0)"))

    api = grading.open_course(folder)
    students = grading.collect(api, "hw01", handed_in)
    assert len(students) == 17
    finished: list[str] = []
    grading.autograde(api, "hw01", done=finished.append)
    assert finished == students
    assert outside.read_text() == "untouched"
    return {row.student: row for row in grades(api, "hw01")}


def test_the_solution_has_all_points_and_the_release_none(graded: dict[str, Grades]) -> None:
    assert (graded["solution"].score, graded["solution"].to_mark, graded["solution"].max_score) == (21, 3, 24)
    assert graded["solution"].remarks == ()
    assert (graded["untouched"].score, graded["untouched"].to_mark) == (0, 0)
    assert graded["half"].score == 21 - 4 - 3


def test_what_a_cell_writes_to_stderr_costs_nothing(graded: dict[str, Grades]) -> None:
    assert graded["stderr"].score == 21


def test_a_broken_notebook_gets_nothing_and_a_reason(graded: dict[str, Grades]) -> None:
    assert (graded["broken"].score, graded["broken"].to_mark) == (0, 0)
    assert "is no notebook" in graded["broken"].remarks[0]


def test_deleted_cells_come_back_and_a_deleted_answer_counts_as_none(graded: dict[str, Grades]) -> None:
    assert graded["deleted"].points["loss-test"] == 4, "the answer was there, only its test was gone"
    assert graded["deleted"].points["labels-test"] == 0
    assert graded["deleted"].points["why-it-rambles"] == 0
    assert graded["deleted"].to_mark == 0
    assert "labels, labels-test, loss-test, why-it-rambles" in graded["deleted"].remarks[0]


@pytest.mark.parametrize("student", ["edits", "disguises", "patches"])
def test_a_test_that_was_tampered_with_tests_all_the_same(graded: dict[str, Grades], student: str) -> None:
    assert graded[student].points["loss-test"] == 0
    assert graded[student].score == 17


def test_lines_that_an_honest_answer_has_no_use_for_are_shown(graded: dict[str, Grades]) -> None:
    assert "input_transformers_cleanup" in graded["patches"].remarks[0]


@pytest.mark.parametrize("student", ["deletes", "reads", "forks", "connects"])
def test_what_is_refused_leaves_the_rest_of_the_notebook_its_points(
    graded: dict[str, Grades], folder: Path, student: str
) -> None:
    assert graded[student].score == 21
    page = nbformat.read(folder / "autograded" / student / "hw01" / "hw01.ipynb", as_version=4)
    output = page.cells[0].outputs[0]
    assert output.output_type == "error"
    assert "GOT" not in str(page.cells[0].outputs)
    assert any(word in output.evalue for word in ("not allowed here", "ermission denied", "not permitted"))


@pytest.mark.parametrize(
    ("student", "limit"), [("prints", "MB of output"), ("fills", "MB of files"), ("exits", "ended itself")]
)
def test_a_limit_ends_a_submission_and_is_named(graded: dict[str, Grades], student: str, limit: str) -> None:
    assert graded[student].score == 0
    assert limit in graded[student].remarks[0]


def test_a_cell_that_takes_too_long_is_interrupted(graded: dict[str, Grades]) -> None:
    assert graded["sleeps"].score == 21


def test_feedback_is_a_page_for_everybody(graded: dict[str, Grades], folder: Path) -> None:
    pages = grading.feedback(grading.open_course(folder), "hw01", ["half", "broken"])
    texts = {page.parts[-3]: page.read_text(encoding="utf-8") for page in pages}
    assert "the number of" in texts["half"] or "NameError" in texts["half"]
    assert "could not be graded" in texts["broken"]


def test_the_table_of_grades(graded: dict[str, Grades], tmp_path: Path) -> None:
    write_csv(list(graded.values()), tmp_path / "grades.csv")
    rows = {row["student"]: row for row in csv.DictReader((tmp_path / "grades.csv").open())}
    assert len(rows) == 17
    assert rows["solution"]["score"] == "21.0"
    assert rows["solution"]["why-it-rambles"] == ""
    assert rows["half"]["loss-test"] == "0.0"


def test_the_command_line(folder: Path, course: Course) -> None:
    assert "is unknown: there are hw01" in course("homework", "release", "hw1", "--folder", str(folder)).stderr
    assert "is no course folder" in course("homework", "report", "hw01", "--folder", "nowhere").stderr
