"""`course homework …`: hand out, validate, collect, grade."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from course_lib.errors import InputError
from course_lib.files import read_text

homework_app = typer.Typer(no_args_is_help=True, help="Hand out, collect and grade homework.")
FolderOption = Annotated[Path, typer.Option("--folder", help="the course folder, with source/ and nbgrader_config.py")]
StudentsOption = Annotated[
    list[str] | None, typer.Option("--student", help="only this student; may be given several times")
]
COURSE = Path("notebooks/homework")


@homework_app.callback()
def check_installed() -> None:
    """Hand out, collect and grade homework."""
    missing = [module for module in ("nbgrader", "nbformat", "nbclient", "ipykernel") if find_spec(module) is None]
    if missing:
        raise InputError(f"homework needs {', '.join(missing)}; install it: pip install 'course-lib[homework]'")


@homework_app.command()
def release(
    assignment: str,
    student_seed: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="a seed of their own for every student named in FILE, one a line"),
    ] = None,
    folder: FolderOption = COURSE,
) -> None:
    """Make the notebooks that learners get: no solutions, no hidden tests; prints the folder."""
    from course_lib.homework import grading

    students = read_text(student_seed).split() if student_seed else []
    print(grading.release(grading.open_course(folder), assignment, students))


@homework_app.command()
def validate(
    notebook: Path,
    seconds: Annotated[int, typer.Option(min=1, help="time a cell may take")] = 300,
) -> None:
    """For learners: is it complete, unharmed, and do its checks pass? Exit status 1 where something is left to do."""
    from course_lib.homework.validate import validate

    result = validate(notebook, seconds=seconds)
    for fault in result.faults:
        print(f"mend       {fault}")
    for name in result.unanswered:
        print(f"no answer  {name}")
    for name, why in result.failed.items():
        if why != "no answer yet":
            print(f"fails      {name}: {why}")
    print(
        f"points     {result.points:g} of {result.max_points:g} by the checks you can see; {result.written_points:g} more are marked by hand"
    )
    if not result.good:
        raise typer.Exit(1)


@homework_app.command()
def collect(
    assignment: str,
    handed_in: Annotated[Path, typer.Argument(help="holds STUDENT.ipynb, or a folder for each student")],
    folder: FolderOption = COURSE,
) -> None:
    """Copy what was handed in to submitted/; prints the students."""
    from course_lib.homework import grading

    print("\n".join(grading.collect(grading.open_course(folder), assignment, handed_in)))


@homework_app.command()
def autograde(assignment: str, student: StudentsOption = None, folder: FolderOption = COURSE) -> None:
    """Run every submission in a locked-down process and give the points of its tests; prints what is to be known."""
    from course_lib.homework import grading

    api = grading.open_course(folder)
    wanted = grading.to_grade(api, assignment, student or [])
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(assignment, total=len(wanted))
        grading.autograde(api, assignment, wanted, done=lambda name: progress.advance(task))
    _report(assignment, folder)


@homework_app.command()
def feedback(assignment: str, student: StudentsOption = None, folder: FolderOption = COURSE) -> None:
    """Write an HTML page for every student; prints their paths."""
    from course_lib.homework import grading

    print("\n".join(map(str, grading.feedback(grading.open_course(folder), assignment, student or []))))


@homework_app.command()
def report(
    assignment: str,
    folder: FolderOption = COURSE,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Points of everybody, and grades/ASSIGNMENT.csv."""
    _report(assignment, folder, as_json=as_json)


def _report(assignment: str, folder: Path, *, as_json: bool = False) -> None:
    from dataclasses import asdict

    from course_lib.homework import grading
    from course_lib.homework.report import grades, write_csv

    rows = grades(grading.open_course(folder), assignment)
    path = folder / "grades" / f"{assignment}.csv"
    write_csv(rows, path)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], ensure_ascii=False, indent=1))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("student", "points", "of", "to mark", "remarks"):
        table.add_column(
            column, no_wrap=column != "remarks", justify="left" if column in ("student", "remarks") else "right"
        )
    for row in rows:
        table.add_row(row.student, f"{row.score:g}", f"{row.max_score:g}", f"{row.to_mark:g}", "; ".join(row.remarks))
    console = Console(width=140)
    console.print(table, markup=False)
    print(path)
