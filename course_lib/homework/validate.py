"""What a learner should know before handing in: cells that are gone, doubled, of another kind or changed, and which checks fail."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from course_lib.errors import InputError
from course_lib.files import read_json
from course_lib.homework.grading import TAG
from course_lib.homework.restore import cell_id

FRESH = "copy it from a fresh copy of the assignment"


@dataclass(frozen=True)
class Validation:
    """`faults` is what to mend, `failed` the checks that fail: exercise -> why. Points are those of the visible checks."""

    faults: list[str]
    unanswered: list[str]
    failed: dict[str, str]
    points: float
    max_points: float
    written_points: float

    @property
    def good(self) -> bool:
        """Whether there is nothing left to do."""
        return not (self.faults or self.unanswered or self.failed)


def validate(path: str | Path, *, seconds: int = 300) -> Validation:
    """Look at the cells, then run the notebook from the top in a fresh kernel, as the grader will.

    Args:
        seconds: a cell may take.

    Raises:
        InputError: it is no notebook, or no released assignment.
    """
    path = Path(path)
    read_json(path)  # for its errors
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except (nbformat.ValidationError, ValueError, AttributeError, KeyError) as error:
        raise InputError(
            f"{path}: is no notebook ({str(error).splitlines()[0][:120]}); save it again in JupyterLab"
        ) from None
    wanted = notebook.metadata.get(TAG, {}).get("cells")
    if not wanted:
        raise InputError(f"{path}: is no assignment as it was handed out; check the file, or take a fresh copy")
    faults = cell_faults(notebook, wanted)
    unanswered = _unanswered(notebook)
    points, failed = _run(notebook, path.parent, seconds)
    most = sum(cell["points"] for cell in wanted if cell["type"] == "code")
    written = sum(cell["points"] for cell in wanted if cell["type"] != "code")
    return Validation(faults, unanswered, failed, points, most, written)


def cell_faults(notebook: NotebookNode, wanted: list[dict]) -> list[str]:  # type: ignore[type-arg]
    """Deleted, copied, re-typed and changed locked cells, in plain words with what to do."""
    from nbgrader.utils import compute_checksum, is_locked

    faults = []
    for original in wanted:
        name, kind = original["id"], original["type"]
        found = [(number, cell) for number, cell in enumerate(notebook.cells, start=1) if cell_id(cell) == name]
        what = f"the {'test ' if original['points'] and kind == 'code' else ''}cell {name!r}"
        if not found:
            faults.append(f"{what} was deleted: Edit > Undo Cell Operation, or {FRESH}")
        if len(found) > 1:
            numbers = " and ".join(str(number) for number, _ in found)
            faults.append(
                f"{what} is there {len(found)} times (cells {numbers}), and the last one alone counts: delete the others"
            )
        for number, cell in found:
            if cell.cell_type != kind:
                key = "Y" if kind == "code" else "M"
                faults.append(
                    f"{what} was {kind} and is {cell.cell_type} now (cell {number}): click left of it and press {key}"
                )
            elif is_locked(cell) and cell.metadata.nbgrader.get("checksum") != compute_checksum(cell):
                faults.append(
                    f"{what} was changed (cell {number}): grading puts the old text back, so your change does not count; {FRESH}"
                )
    return faults


def _unanswered(notebook: NotebookNode) -> list[str]:
    from nbgrader.utils import compute_checksum, is_solution

    return [
        str(cell_id(cell))
        for cell in notebook.cells
        if is_solution(cell) and cell_id(cell) and cell.metadata.nbgrader.get("checksum") == compute_checksum(cell)
    ]


def _run(notebook: NotebookNode, folder: Path, seconds: int) -> tuple[float, dict[str, str]]:
    """Points of the visible checks, and why the others fail."""
    from nbgrader.preprocessors import Execute
    from nbgrader.utils import is_grade

    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    Execute(timeout=seconds, shutdown_kernel="immediate").preprocess(notebook, {"metadata": {"path": str(folder)}})
    points, failed = 0.0, {}
    for cell in notebook.cells:
        if cell.cell_type != "code" or not is_grade(cell):
            continue
        errors = [output for output in cell.outputs if output.output_type == "error"]
        if errors:
            said = f"{errors[0].ename}: {errors[0].evalue}".removeprefix("CheckFailed: ")
            failed[str(cell_id(cell))] = "no answer yet" if errors[0].ename == "NotImplementedError" else said
        else:
            points += cell.metadata.nbgrader["points"]
    return points, failed
