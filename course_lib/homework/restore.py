"""What a submission must not change is put back before it runs: deleted cells, cells of another type, what counts and how much.

nbgrader restores the text of locked cells that it finds. A test cell that is gone, or no longer says that it is one, it gives no
score and leaves to be marked by hand. Notes of what was done stand in the notebook's metadata, under `course_homework`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbgrader.preprocessors import NbGraderPreprocessor

from course_lib.homework.oddities import oddities
from course_lib.homework.seeds import seed_line, seeds_file

NOTES = "course_homework"


class RestoreCells(NbGraderPreprocessor):
    """Put the cells of the release back that are missing or disguised; an answer that was deleted counts as not given."""

    def preprocess(self, nb: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
        """Change `nb` in place, and note what was done."""
        released = nbformat.read(released_notebook(self, resources), as_version=4)
        restored = restore_cells(nb, released)
        nb.metadata[NOTES] = {"restored": restored, "oddities": oddities(nb)}
        return nb, resources


class StudentSeed(NbGraderPreprocessor):
    """Give the notebook the seed its student was handed out, where the assignment has seeds."""

    def preprocess(self, nb: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
        """Change the cell `seed` of `nb` in place."""
        student = resources["nbgrader"]["student"]
        file = seeds_file(Path(self.parent.parent.coursedir.root), resources["nbgrader"]["assignment"])
        seeds = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if student in seeds:
            for cell in nb.cells:
                if cell_id(cell) == "seed":
                    cell.source = seed_line(seeds[student])
        return nb, resources


def released_notebook(preprocessor: Any, resources: Any) -> Path:
    """The notebook as it was handed out."""
    folders = preprocessor.parent.parent.coursedir  # the exporter's converter's
    names = resources["nbgrader"]
    return Path(folders.format_path(folders.release_directory, ".", names["assignment"])) / f"{names['notebook']}.ipynb"


def restore_cells(submitted: NotebookNode, released: NotebookNode) -> list[str]:
    """Make `submitted` have every nbgrader cell of `released`, as what it was; return the names of those put back.

    Cells keep the order of the submission; a missing one goes behind the one that it followed.
    """
    restored = []
    previous: str | None = None
    for original in released.cells:
        name = cell_id(original)
        if name is None:
            continue
        places = [place for place, cell in enumerate(submitted.cells) if cell_id(cell) == name]
        for place in places:
            _same_kind(submitted.cells[place], original)
        if not places:
            before = [place for place, cell in enumerate(submitted.cells) if cell_id(cell) == previous]
            at = before[-1] + 1 if previous is not None and before else 0
            submitted.cells.insert(at, nbformat.from_dict(dict(original)))
            restored.append(name)
        previous = name
    return restored


def cell_id(cell: NotebookNode) -> str | None:
    """nbgrader's name of a cell; None for all others."""
    meta = cell.metadata.get("nbgrader")
    return meta.get("grade_id") if isinstance(meta, dict) else None


def _same_kind(cell: NotebookNode, original: NotebookNode) -> None:
    cell.metadata["nbgrader"] = nbformat.from_dict(dict(original.metadata["nbgrader"]))
    if cell.cell_type != original.cell_type:
        cell.cell_type = original.cell_type
        for key in ("outputs", "execution_count"):
            cell.pop(key, None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
