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

from course_lib.errors import InputError, install_extra
from course_lib.files import read_text

homework_app = typer.Typer(no_args_is_help=True, help="Hand out, collect and grade homework.")
FolderOption = Annotated[Path, typer.Option("--folder", help="the course folder, with source/ and nbgrader_config.py")]
StudentsOption = Annotated[
    list[str] | None, typer.Option("--student", help="only this student; may be given several times")
]
PrivateOption = Annotated[
    bool, typer.Option("--allow-private", help="look at addresses of this machine and its network, too")
]
COURSE = Path("notebooks/homework")


@homework_app.callback()
def check_installed() -> None:
    """Hand out, collect and grade homework."""
    missing = [module for module in ("nbgrader", "nbformat", "nbclient", "ipykernel") if find_spec(module) is None]
    if missing:
        raise InputError(f"homework needs {', '.join(missing)}; {install_extra('homework')}")


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
    online: Annotated[
        bool, typer.Option("--online", help="look first at the addresses in the submissions, from this machine")
    ] = False,
    private: PrivateOption = False,
) -> None:
    """Points of everybody, and grades/ASSIGNMENT.csv."""
    if online:
        _look(assignment, folder, private=private)
    _report(assignment, folder, as_json=as_json)


@homework_app.command()
def check_url(
    adapter: Annotated[str, typer.Option(help="owner/name on the Hub, or the address of the repository")] = "",
    server: Annotated[str, typer.Option(help="address of an app, or of an OpenAI-compatible server")] = "",
    private: PrivateOption = False,
) -> None:
    """Is it there for others: a published adapter, a running app or server? Exit status 1 where it is not."""
    from course_lib.homework.online import look

    found = look(adapter, server, private=private)
    if not found:
        raise InputError("no address is given: name one with --adapter or --server")
    for what, finding in found.items():
        print(f"{what:8} {'ok' if finding.good else 'not yet':8} {finding.says}")
    if not all(finding.good for finding in found.values()):
        raise typer.Exit(1)


def _look(assignment: str, folder: Path, *, private: bool) -> None:
    from course_lib.homework import grading, online

    api = grading.open_course(folder)
    given = grading.submitted_addresses(api, assignment)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("addresses", total=len(given))
        online.look_at_class(
            Path(api.coursedir.root), assignment, given, private=private, done=lambda student: progress.advance(task)
        )


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
    texts = ["online", "remarks"] if any(row.online for row in rows) else ["remarks"]
    for column in ("student", "points", "of", "to mark", *texts):
        table.add_column(
            column, no_wrap=column not in texts, justify="left" if column in ("student", *texts) else "right"
        )
    for row in rows:
        online = "\n".join(f"{what} {found}" for what, found in row.online.items())
        said = [online, "; ".join(row.remarks)][-len(texts) :]
        table.add_row(row.student, f"{row.score:g}", f"{row.max_score:g}", f"{row.to_mark:g}", *said)
    console = Console(width=140)
    console.print(table, markup=False)
    print(path)
