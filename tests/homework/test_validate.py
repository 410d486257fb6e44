"""What `course homework validate` tells a learner, and the other commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from assignments import nbgrader
from course_runner import Course
from submissions import answered

pytest.importorskip("nbgrader")
from course_lib.errors import InputError
from course_lib.homework import grading
from course_lib.homework.validate import cell_faults, validate


@pytest.fixture
def release(folder: Path) -> Path:
    return folder / "release" / "hw01"


def faults(notebook: Any) -> str:
    return "\n".join(cell_faults(notebook, notebook.metadata["homework"]["cells"]))


def cells_of(notebook: Any) -> dict[str, Any]:
    return {nbgrader(cell).get("grade_id"): cell for cell in notebook.cells}


def test_a_whole_notebook_has_no_faults(release: Path) -> None:
    assert faults(answered(release, "hw01")) == ""


def test_deleted_copied_retyped_and_changed_cells_are_named_with_what_to_do(release: Path) -> None:
    notebook = answered(release, "hw01")
    cells = cells_of(notebook)
    notebook.cells.remove(cells["labels-test"])
    notebook.cells.insert(3, nbformat.from_dict(dict(cells["batch"])))
    cells["forged"].cell_type = "markdown"
    cells["loss-test"].source = "pass"
    told = faults(notebook).splitlines()
    assert len(told) == 4
    assert "the cell 'forged' was code and is markdown now" in told[0]
    assert "press Y" in told[0]
    assert "the test cell 'labels-test' was deleted: Edit > Undo" in told[1]
    assert "'batch' is there 2 times" in told[2]
    assert "delete the others" in told[2]
    assert "the test cell 'loss-test' was changed" in told[3]
    assert "does not count" in told[3]


def test_the_command_says_what_is_left_to_do(release: Path, tmp_path: Path, course: Course) -> None:
    nbformat.write(
        answered(release, "hw01", wrong={"cut": "nothing_to_train, end_cut_off = 0, 0"}), tmp_path / "mine.ipynb"
    )
    result = course("homework", "validate", "mine.ipynb")
    assert result.returncode == 1
    assert "fails      cut-test: the number of rows with nothing to train is another" in result.stdout
    assert "points     18 of 21 by the checks you can see; 3 more are marked by hand" in result.stdout
    shutil.copy(release / "hw01.ipynb", tmp_path / "fresh.ipynb")
    fresh = course("homework", "validate", "fresh.ipynb")
    assert fresh.stdout.count("no answer") == 7
    assert "points     0 of 21" in fresh.stdout


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is no JSON"),
        ("{}", "no notebook"),
        (
            json.dumps({"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}),
            "no assignment as it was handed out",
        ),
    ],
)
def test_what_is_no_assignment_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.ipynb").write_text(text)
    with pytest.raises(InputError, match=says):
        validate(tmp_path / "x.ipynb")


def test_every_student_has_a_seed_of_their_own_that_the_grader_puts_back(folder: Path) -> None:
    own = {
        name: nbformat.read(folder / "release-students" / name / "hw01" / "hw01.ipynb", as_version=4)
        for name in ("ada", "bob")
    }
    seeds = {name: cells_of(notebook)["seed"].source for name, notebook in own.items()}
    assert seeds["ada"] != seeds["bob"]
    assert "SEED = 0" not in seeds.values()
    assert faults(own["ada"]) == ""
    submitted = folder / "submitted" / "ada" / "hw01"
    submitted.mkdir(parents=True)
    nbformat.write(answered(folder / "release" / "hw01", "hw01"), submitted / "hw01.ipynb")  # the cell says SEED = 0
    api = grading.open_course(folder)
    assert grading.autograde(api, "hw01")["ada"]["error"] == ""
    graded = nbformat.read(folder / "autograded" / "ada" / "hw01" / "hw01.ipynb", as_version=4)
    assert cells_of(graded)["seed"].source == seeds["ada"]
    assert not [output for output in cells_of(graded)["cut-test"].outputs if output.output_type == "error"]


def test_the_commands_of_a_teacher(folder: Path, tmp_path: Path, course: Course) -> None:
    at = ("--folder", str(folder))
    assert course("homework", "release", "hw01", *at).stdout.strip() == str(folder / "release" / "hw01")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "cy.ipynb").write_text("{")
    assert course("homework", "collect", "hw01", "in", *at).stdout == "cy\n"
    result = course("homework", "autograde", "hw01", "--student", "cy", *at)
    assert result.returncode == 0
    assert "not graded: hw01.ipynb is no notebook" in " ".join(result.stdout.split())
    assert (folder / "grades" / "hw01.csv").read_text().startswith("student,score,max_score,to_mark")
    rows = json.loads(course("homework", "report", "hw01", "--json", *at).stdout)
    assert "cy" in [row["student"] for row in rows]
    assert course("homework", "feedback", "hw01", "--student", "cy", *at).stdout.strip().endswith("cy/hw01/hw01.html")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["release", "hw1"], "'hw1' is unknown: there are hw01"),
        (["collect", "hw01", "nowhere"], "nowhere: no such folder"),
        (["autograde", "hw01", "--student", "zoe"], "zoe: handed in nothing"),
        (["report", "hw09"], "nothing is graded yet"),
        (["feedback", "hw09"], "nothing is graded yet"),
        (["autograde", "hw09"], "is not released yet"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], says: str, folder: Path, course: Course) -> None:
    result = course("homework", *arguments, "--folder", str(folder))
    assert result.returncode == 2
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_folder_that_is_no_course_is_refused(course: Course) -> None:
    assert "is no course folder" in course("homework", "report", "hw01", "--folder", "nowhere").stderr


def test_without_the_extra_a_command_says_what_to_install(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("course_lib.cli_homework.find_spec", lambda module: None if module == "nbgrader" else module)
    done = course("homework", "release", "hw01")
    assert done.returncode == 2
    assert done.stderr == (
        "course: homework needs nbgrader; in the project's folder, pip install -c constraints.txt -e '.[homework]'\n"
    )
