"""Points of a class as a table and as CSV, with the reasons nbgrader does not keep."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from course_lib.errors import InputError
from course_lib.files import write_text
from course_lib.homework.online import online_file

if TYPE_CHECKING:
    from nbgrader.apps import NbGraderAPI


@dataclass(frozen=True)
class Grades:
    """One submission.

    Attributes:
        points: of each graded cell, in the order of the gradebook; None where it is still to be marked by hand.
        to_mark: points that are still to be given by hand.
        remarks: what a teacher should know, in plain words.
        online: what was found at the addresses that were given, by adapter and server; empty where nobody looked.
    """

    student: str
    points: dict[str, float | None]
    score: float
    max_score: float
    to_mark: float
    remarks: tuple[str, ...]
    online: dict[str, str] = field(default_factory=dict)


def grades(api: NbGraderAPI, assignment: str) -> list[Grades]:
    """The grades of everybody who handed in.

    Raises:
        InputError: nothing is graded yet.
    """
    file = Path(api.coursedir.root) / "grades" / f"{assignment}.json"
    if not file.exists():
        raise InputError(f"{assignment}: nothing is graded yet; run: course homework autograde {assignment}")
    notes = json.loads(file.read_text(encoding="utf-8"))
    seen = online_file(Path(api.coursedir.root), assignment)
    online = json.loads(seen.read_text(encoding="utf-8")) if seen.exists() else {}
    rows = []
    with api.gradebook as gradebook:
        for student, note in notes.items():
            submission = gradebook.find_submission(assignment, student)
            points, to_mark = {}, 0.0
            for notebook in submission.notebooks:
                for grade in sorted(notebook.grades, key=lambda grade: grade.name):
                    waits = grade.needs_manual_grade and grade.manual_score is None
                    points[grade.name] = None if waits else grade.score
                    to_mark += grade.max_score if waits else 0
            remarks = _remarks(note)
            penalty = submission.late_submission_penalty or 0.0
            score = max(0.0, sum(value or 0.0 for value in points.values()) - penalty)
            found = {what: _found(finding) for what, finding in online.get(student, {}).items()}
            rows.append(Grades(student, points, score, submission.max_score, to_mark, remarks, found))
    return sorted(rows, key=lambda row: row.student)


def write_csv(rows: list[Grades], path: Path) -> None:
    """One line a submission; an empty cell is one still to be marked."""
    names = list(dict.fromkeys(name for row in rows for name in row.points))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    addresses = [what for what in ("adapter", "server") if any(what in row.online for row in rows)]
    writer.writerow(["student", "score", "max_score", "to_mark", *names, *addresses, "remarks"])
    for row in rows:
        points = ["" if row.points.get(name) is None else row.points[name] for name in names]
        found = [row.online.get(what, "") for what in addresses]
        cells = [row.student, row.score, row.max_score, row.to_mark, *points, *found, "; ".join(row.remarks)]
        # a spreadsheet takes a text that begins so for a formula
        writer.writerow([f"'{cell}" if str(cell).startswith(("=", "+", "@", "-")) else cell for cell in cells])
    write_text(path, out.getvalue())


def _found(finding: dict) -> str:  # type: ignore[type-arg]
    return f"{'ok' if finding['good'] else 'not yet'}: {finding['says']} ({finding['address']})"


def _remarks(note: dict) -> tuple[str, ...]:  # type: ignore[type-arg]
    remarks = []
    if note["error"]:
        remarks.append(f"not graded: {note['error']}")
    if note["ended"]:
        remarks.append(f"stopped by {note['ended']}")
    if note["restored"]:
        remarks.append(f"deleted cells put back: {', '.join(note['restored'])}")
    if note["oddities"]:
        remarks.append(f"read these lines: {' | '.join(note['oddities'])}")
    return tuple(remarks)
