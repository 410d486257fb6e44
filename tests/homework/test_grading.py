"""Hand out, collect, grade: nbgrader end to end, with honest, careless and hostile submissions."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from assignments import nbgrader
from submissions import answered, solution_lines

pytest.importorskip("nbgrader")
from course_lib.homework import grading
from course_lib.homework.report import Grades, grades, write_csv

PATCH = """
from course_lib.homework import checks_01
for name in ("loss", "cut"):
    setattr(checks_01, name, lambda *a, **k: None)
get_ipython().input_transformers_cleanup.append(lambda lines: ["pass"])
"""


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
    handed_in = tmp_path_factory.mktemp("handed_in")
    release = folder / "release" / "hw01"

    def hand_in(student: str, change: Callable[[dict[str, Any], Any], object], **options: Any) -> None:
        notebook = answered(release, "hw01", **options)
        change({nbgrader(cell).get("grade_id"): cell for cell in notebook.cells}, notebook)
        nbformat.write(notebook, handed_in / f"{student}.ipynb")

    def nothing(cells: dict[str, Any], notebook: Any) -> None:
        pass

    def delete(cells: dict[str, Any], notebook: Any) -> None:
        for name in ("loss-test", "labels", "labels-test", "why-it-rambles"):
            notebook.cells.remove(cells[name])

    def tamper(cells: dict[str, Any], notebook: Any) -> None:
        cells["loss-test"].source = "pass"
        disguised = cells["cut-test"]
        disguised.metadata["nbgrader"].update(grade=False, locked=False, points=1)
        disguised.cell_type = "markdown"
        del disguised["outputs"], disguised["execution_count"]

    hand_in("solution", nothing)
    nbformat.write(release_of(folder), handed_in / "untouched.ipynb")
    wrong = {"loss": "def loss(logits, labels):\n    return 0.0", "cut": "nothing_to_train, end_cut_off = 0, 0"}
    hand_in(
        "careless", nothing, wrong=wrong, first="import sys, warnings\nprint('x', file=sys.stderr)\nwarnings.warn('y')"
    )
    (handed_in / "broken.ipynb").write_text('{"cells": [', encoding="utf-8")
    hand_in("deletes", delete)
    hand_in("tampers", tamper, wrong=wrong)
    hand_in("patches", nothing, wrong=wrong, first=PATCH)
    hand_in("exits", nothing, first="import os\nos._exit(0)")

    api = grading.open_course(folder)
    students = grading.collect(api, "hw01", handed_in)
    assert len(students) == 8
    finished: list[str] = []
    grading.autograde(api, "hw01", done=finished.append)
    assert finished == students
    return {row.student: row for row in grades(api, "hw01")}


def test_the_solution_has_all_points_and_the_release_none(graded: dict[str, Grades]) -> None:
    assert (graded["solution"].score, graded["solution"].to_mark, graded["solution"].max_score) == (21, 3, 24)
    assert graded["solution"].remarks == ()
    assert (graded["untouched"].score, graded["untouched"].to_mark) == (0, 0)


def test_wrong_answers_cost_their_points_and_stderr_none(graded: dict[str, Grades]) -> None:
    assert graded["careless"].score == 21 - 4 - 3


def test_a_broken_notebook_gets_nothing_and_a_reason(graded: dict[str, Grades]) -> None:
    assert (graded["broken"].score, graded["broken"].to_mark) == (0, 0)
    assert "is no notebook" in graded["broken"].remarks[0]


def test_deleted_cells_come_back_and_a_deleted_answer_counts_as_none(graded: dict[str, Grades]) -> None:
    assert graded["deletes"].points["loss-test"] == 4, "the answer was there, only its test was gone"
    assert graded["deletes"].points["labels-test"] == 0
    assert graded["deletes"].points["why-it-rambles"] == 0
    assert graded["deletes"].to_mark == 0
    assert "labels, labels-test, loss-test, why-it-rambles" in graded["deletes"].remarks[0]


@pytest.mark.parametrize("student", ["tampers", "patches"])
def test_a_test_that_was_tampered_with_tests_all_the_same(graded: dict[str, Grades], student: str) -> None:
    assert graded[student].points["loss-test"] == graded[student].points["cut-test"] == 0
    assert graded[student].score == 14


def test_lines_that_an_honest_answer_has_no_use_for_are_shown(graded: dict[str, Grades]) -> None:
    assert "input_transformers_cleanup" in graded["patches"].remarks[0]


def test_a_submission_that_ends_itself_is_named(graded: dict[str, Grades]) -> None:
    assert graded["exits"].score == 0
    assert "it ended itself" in graded["exits"].remarks[0]


def test_feedback_is_a_page_for_everybody(graded: dict[str, Grades], folder: Path) -> None:
    pages = grading.feedback(grading.open_course(folder), "hw01", ["careless", "broken"])
    texts = {page.parts[-3]: page.read_text(encoding="utf-8") for page in pages}
    assert "take one row by hand" in texts["careless"]
    assert "could not be graded" in texts["broken"]


def test_the_table_of_grades(graded: dict[str, Grades], tmp_path: Path) -> None:
    write_csv(list(graded.values()), tmp_path / "grades.csv")
    rows = {row["student"]: row for row in csv.DictReader((tmp_path / "grades.csv").open())}
    assert len(rows) == 8
    assert rows["solution"]["score"] == "21.0"
    assert rows["solution"]["why-it-rambles"] == ""
    assert rows["careless"]["loss-test"] == "0.0"
