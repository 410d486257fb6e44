"""Submissions of a class, made from a released assignment."""

from __future__ import annotations

from pathlib import Path

import nbformat
from assignments import nbgrader, notebook, solution
from nbformat.v4 import new_code_cell

WRITTEN = "The end token was masked; the loss cannot see it; look at the labels of one row."


def answered(
    release: Path, assignment: str, *, wrong: dict[str, str] | None = None, first: str = ""
) -> nbformat.NotebookNode:
    """The released notebook with the solutions filled in, but for `wrong` ones; `first` is a cell put before all others."""
    handed_in = nbformat.read(release / f"{assignment}.ipynb", as_version=4)
    sources = {nbgrader(cell).get("grade_id"): cell for cell in notebook(assignment).cells}
    for cell in handed_in.cells:
        meta = nbgrader(cell)
        if not meta.get("solution"):
            continue
        name = meta["grade_id"]
        if cell.cell_type == "markdown":
            cell.source = WRITTEN
        else:
            cell.source = (wrong or {}).get(name, sources[name].source)
    if first:
        handed_in.cells.insert(0, new_code_cell(first))
    return handed_in


def without_marks(text: str) -> str:
    """A solution as a learner writes it."""
    return "\n".join(line for line in text.splitlines() if "### " not in line)


def solution_lines(assignment: str) -> set[str]:
    """Lines of the solutions that stand nowhere else."""
    cells = [cell for cell in notebook(assignment).cells if nbgrader(cell).get("solution")]
    return {line.strip() for cell in cells for line in solution(cell).splitlines() if len(line.strip()) > 20}
