"""Every exercise: the solution passes, nothing passes unanswered, and plausible wrong answers get the right diagnosis."""

from __future__ import annotations

import json

import pytest
from assignments import ASSIGNMENTS, SOURCE, exercises, is_test, mutants, nbgrader, notebook, run, solution
from submissions import solution_lines

from course_lib.homework.checks import CheckFailed

EXERCISES = [(assignment, exercise) for assignment in ASSIGNMENTS for exercise in exercises(assignment)]
MUTANTS = [
    pytest.param(assignment, exercise, mutant, id=f"{assignment}-{exercise}-{number}")
    for assignment, exercise in EXERCISES
    for number, mutant in enumerate(mutants(assignment)[exercise], start=1)
]


def test_there_are_assignments() -> None:
    assert "hw01" in ASSIGNMENTS


@pytest.mark.parametrize(("assignment", "exercise"), EXERCISES)
def test_the_solution_passes(assignment: str, exercise: str) -> None:
    run(assignment, exercise)
    run(assignment, exercise, visible_alone=True)


@pytest.mark.parametrize(("assignment", "exercise"), EXERCISES)
def test_what_is_handed_out_passes_nothing_and_is_called_unanswered(assignment: str, exercise: str) -> None:
    with pytest.raises(NotImplementedError):
        run(assignment, exercise, unanswered=True)


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_nbgrader_takes_every_solution_out(assignment: str) -> None:
    pytest.importorskip("nbgrader")
    from nbgrader.preprocessors import ClearHiddenTests, ClearSolutions

    handed_out = notebook(assignment)
    handed_out.metadata["kernelspec"]["language"] = "python"
    for preprocessor in (ClearSolutions(), ClearHiddenTests()):
        handed_out, _ = preprocessor.preprocess(handed_out, {})
    text = "\n".join(cell.source for cell in handed_out.cells)
    assert "BEGIN" not in text
    assert "seed=" not in text
    assert not [line for line in solution_lines(assignment) if line in text]


@pytest.mark.parametrize(("assignment", "exercise", "mutant"), MUTANTS)
def test_a_wrong_answer_is_told_what_is_wrong(assignment: str, exercise: str, mutant: tuple[str, ...]) -> None:
    with pytest.raises(CheckFailed) as failed:
        run(assignment, exercise, mutant)
    assert mutant[0] in str(failed.value)
    answer = next(cell for cell in notebook(assignment).cells if nbgrader(cell).get("grade_id") == exercise)
    lines = [line.strip() for line in solution(answer).splitlines()]
    assert not [line for line in lines if len(line) > 25 and line in str(failed.value)], (
        "the diagnosis shows the solution"
    )


@pytest.mark.parametrize(("assignment", "exercise"), EXERCISES)
def test_every_exercise_has_two_wrong_answers_or_more_(assignment: str, exercise: str) -> None:
    assert len(mutants(assignment)[exercise]) >= 2
    assert len({mutant[0] for mutant in mutants(assignment)[exercise]}) >= 2


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_a_source_notebook_is_well_made(assignment: str) -> None:
    cells = notebook(assignment).cells
    text = json.dumps(cells)
    assert (SOURCE / assignment / f"{assignment}.ipynb").stat().st_size < 60_000
    assert "course homework validate" in text
    names = [nbgrader(cell)["grade_id"] for cell in cells if nbgrader(cell)]
    assert len(names) == len(set(names))
    tests = [cell for cell in cells if is_test(nbgrader(cell))]
    assert (
        4 <= len(tests) + sum(bool(nbgrader(cell).get("grade")) for cell in cells if cell.cell_type == "markdown") <= 8
    )
    for cell in tests:
        visible, hidden = cell.source.split("### BEGIN HIDDEN TESTS")
        check = visible.strip().split("(")[0]
        assert check.startswith("checks.")
        assert check + "(" in hidden, "the hidden test calls the same check"
    for cell in cells:
        assert not cell.get("outputs")
    headings = [cell.source for cell in cells if cell.cell_type == "markdown" and cell.source.startswith("## ")]
    assert all(" min, " in heading and " points*" in heading for heading in headings)
    points = sum(int(heading.split(" min, ")[1].split(" points")[0]) for heading in headings)
    assert points == sum(nbgrader(cell).get("points", 0) for cell in cells)
    assert f"{points} points" in cells[0].source
