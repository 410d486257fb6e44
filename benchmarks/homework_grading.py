"""Grade a class of synthetic submissions, and say how long it took: python benchmarks/homework_grading.py [--students 30].

A third are solutions, a third untouched, the rest wrong, broken, or of the kind that is stopped. Written to
benchmarks/results/homework_grading.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell

from course_lib.homework import grading
from course_lib.homework.report import grades
from course_lib.notebook import machine_name

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "homework"))
from submissions import answered  # noqa: E402

KINDS = {
    "solution": "",
    "untouched": None,
    "wrong": "raise ValueError('x')",
    "prints": "for _ in range(1000):\n    print('x' * 10**6)",
    "exits": "import os\nos._exit(0)",
    "broken": None,
}
SHARES = ["solution"] * 10 + ["untouched"] * 10 + ["wrong"] * 6 + ["prints", "exits", "broken", "solution"]


def main() -> None:
    """Make the class, grade it, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--students", type=int, default=30)
    parser.add_argument("--assignment", default="hw01")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        course, handed_in = Path(name) / "course", Path(name) / "in"
        handed_in.mkdir()
        shutil.copytree(ROOT / "notebooks" / "homework" / "source", course / "source")
        shutil.copy(ROOT / "notebooks" / "homework" / "nbgrader_config.py", course)
        api = grading.open_course(course)
        release = grading.release(api, arguments.assignment)
        for number in range(arguments.students):
            kind = SHARES[number % len(SHARES)]
            _hand_in(kind, handed_in / f"student{number:03}.ipynb", release, arguments.assignment)
        grading.collect(api, arguments.assignment, handed_in)
        started = time.perf_counter()
        notes = grading.autograde(api, arguments.assignment)
        seconds = time.perf_counter() - started
        scores = sorted({row.score for row in grades(api, arguments.assignment)})
    result = {
        "assignment": arguments.assignment,
        "submissions": len(notes),
        "seconds": round(seconds, 1),
        "slowest": max(note["seconds"] for note in notes.values()),
        "scores": scores,
        "machine": machine_name(),
        "date": time.strftime("%Y-%m-%d"),
    }
    out = ROOT / "benchmarks" / "results" / "homework_grading.json"
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def _hand_in(kind: str, path: Path, release: Path, assignment: str) -> None:
    first = KINDS[kind]
    if kind == "broken":
        path.write_text('{"cells": [', encoding="utf-8")
    elif kind == "untouched":
        shutil.copy(release / f"{assignment}.ipynb", path)
    else:
        notebook = answered(release, assignment)
        if kind == "wrong":
            notebook.cells.append(new_code_cell(str(first)))
            wrong = next(cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("grade_id") == "loss")
            wrong.source = "def loss(logits, labels):\n    return 0.0"
        elif first:
            notebook.cells.insert(0, new_code_cell(first))
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
