"""Assignments run in this process, cell by cell: an answer can be taken out, or put wrong."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import nbformat

SOURCE = Path(__file__).parents[2] / "notebooks" / "homework" / "source"
ASSIGNMENTS = sorted(path.name for path in SOURCE.iterdir() if path.is_dir())
Mutant = tuple[str, ...]  # (diagnosis, a whole wrong answer) or (diagnosis, text of the solution, what it becomes)


def notebook(assignment: str) -> nbformat.NotebookNode:
    return nbformat.read(SOURCE / assignment / f"{assignment}.ipynb", as_version=4)


def mutants(assignment: str) -> dict[str, list[Mutant]]:
    return importlib.import_module(f"mutants.{assignment}").MUTANTS


def exercises(assignment: str) -> list[str]:
    """Names of the exercises with a check."""
    return [
        meta["grade_id"].removesuffix("-test") for cell in notebook(assignment).cells if is_test(meta := nbgrader(cell))
    ]


def nbgrader(cell: nbformat.NotebookNode) -> dict[str, Any]:
    return cell.metadata.get("nbgrader", {})


def is_test(meta: dict[str, Any]) -> bool:
    return bool(meta.get("grade") and not meta.get("solution"))


def solution(cell: nbformat.NotebookNode) -> str:
    """The lines between the marks."""
    return cell.source.split("### BEGIN SOLUTION\n")[1].split("### END SOLUTION")[0].rstrip()


def cleared(source: str) -> str:
    """A cell as it is handed out."""
    region = re.compile(r"^( *)### BEGIN SOLUTION\n.*?### END SOLUTION", re.DOTALL | re.MULTILINE)
    return region.sub(r"\1raise NotImplementedError()", source)


def mutated(source: str, mutant: Mutant) -> str:
    if len(mutant) == 2:
        return mutant[1]
    _, old, new = mutant
    assert old in source, f"nothing to change: {old!r}"
    return source.replace(old, new)


def run(
    assignment: str,
    exercise: str,
    mutant: Mutant | None = None,
    *,
    visible_alone: bool = False,
    unanswered: bool = False,
) -> None:
    """Run the notebook up to the test of one exercise; raises what its check raises."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook(assignment).cells:
        meta = nbgrader(cell)
        if cell.cell_type != "code" or (is_test(meta) and meta["grade_id"] != f"{exercise}-test"):
            continue
        source = cell.source
        if mutant is not None and meta["grade_id"] == exercise:
            source = mutated(source, mutant)
        if visible_alone:
            source = source.split("### BEGIN HIDDEN TESTS")[0]
        try:
            exec(compile(cleared(source) if unanswered else source, meta["grade_id"], "exec"), names)
        except NotImplementedError:
            if not meta.get("solution"):
                raise
        if is_test(meta):
            return
    raise AssertionError(f"{exercise} has no test")
