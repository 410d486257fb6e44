"""`course data …`: look into data files, show what a recipe makes of its rows, convert and split."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from course_lib.errors import InputError

data_app = typer.Typer(no_args_is_help=True, help="Look into data files; convert and split them.")

JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]
FormOption = Annotated[str, typer.Option("--to", help="messages (JSON Lines) or xtuner (one JSON array)")]
SystemOption = Annotated[
    str, typer.Option("--system", help="system text of rows that have none, or the name of one, such as doctor")
]
FormatOption = Annotated[str, typer.Option("--format", help="the rows' format; auto tells by their keys")]


@data_app.command()
def check(
    file: Path,
    row_format: FormatOption = "auto",
    model: Annotated[
        str | None,
        typer.Option(help="whose tokenizer and template measure the rows; default: the dial's model, if it is here"),
    ] = None,
    template: Annotated[
        str, typer.Option(help="chat template that writes the rows; auto takes the model's own")
    ] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Account for every row: what fits, what does not and why, lengths, duplicates, languages. Exit status 2 if none fits."""
    from course_lib.data.check import check_file
    from course_lib.data.preview import tokenizer_and_template

    tokenizer, chosen = tokenizer_and_template(model, template=template)
    result = check_file(file, row_format=row_format, tokenizer=tokenizer, template=chosen).as_dict()
    if as_json:
        _print_json(result)
    else:
        _print_check(file, result)
    if not result["kept"]:
        raise InputError(f"{file}: no row fits")


def _print_check(file: Path, result: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False, title=str(file), title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name in ("format", "rows", "kept"):
        table.add_row(name, str(result[name]))
    for kind in ("dropped", "notes"):
        for reason, count in result[kind].items():
            numbers = (
                f" (rows {', '.join(map(str, result['dropped_rows'][reason][:8]))}{' …' if count > 8 else ''})"
                if kind == "dropped"
                else ""
            )
            table.add_row("dropped" if kind == "dropped" else "noted", Text(f"{count}: {reason}{numbers}"))
    table.add_row(
        "answers a row", ", ".join(f"{answers}: {rows} rows" for answers, rows in result["answers_per_row"].items())
    )
    for name in ("tool_calls", "empty_answers", "duplicates", "near_duplicates"):
        table.add_row(name.replace("_", " "), str(result[name]))
    table.add_row(
        "languages", ", ".join(f"{language} {rows}" for language, rows in list(result["languages"].items())[:12])
    )
    tokens = result.get("tokens")
    if tokens and tokens["rows"]:
        part = "" if tokens["rows"] == result["kept"] else f"of {tokens['rows']} of {result['kept']} rows: "
        table.add_row(
            "tokens",
            f"{part}{tokens['total']:,}, trained {tokens['trained_share']:.0%}; a row: {tokens['shortest']} to {tokens['longest']}, median {tokens['median']}",
        )
        most = max(tokens["histogram"].values(), default=1)
        for span, rows in tokens["histogram"].items():
            table.add_row(f"  {span}", f"{'█' * round(40 * rows / most) or '▏'} {rows}")
    else:
        why = "this template can write no row; name another with --template"
        if tokens is None:
            why = "the dial's model is not on this machine (course models fetch), or name one with --model"
        table.add_row("tokens", f"not measured: {why}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


@data_app.command()
def preview(
    recipe: Annotated[str, typer.Argument(help="a shipped recipe's name, or a YAML file")],
    number: Annotated[int, typer.Option("-n", help="how many rows or packs")] = 3,
    packed: Annotated[bool, typer.Option("--packed", help="show packs instead of rows")] = False,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is trained: bold and underlined in a terminal, in brackets elsewhere; all other tokens are only read."""
    from course_lib.data.preview import preview_recipe
    from course_lib.recipe import load_recipe

    shown = preview_recipe(load_recipe(recipe, overrides or []), number=number, packed=packed)
    if as_json:
        for row in shown.rows:
            print(json.dumps(row, ensure_ascii=False))
        return
    console = Console(highlight=False, soft_wrap=True)
    for index, row in enumerate(shown.rows, start=1):
        trained = sum(label != -100 for label in row["labels"])
        console.rule(
            f"{'pack' if packed else 'row'} {index}: {len(row['input_ids'])} tokens, {trained} trained", align="left"
        )
        console.print(shown.text(row, brackets=not console.is_terminal or console.no_color))
    print(shown.summary, file=sys.stderr)


@data_app.command()
def convert(
    source: Path,
    target: Path,
    row_format: FormatOption = "auto",
    to: FormOption = "messages",
    system: SystemOption = "",
) -> None:
    """Write every row that fits in another form."""
    from course_lib.data.write import convert_file

    report = convert_file(source, target, row_format=row_format, to=to, system=system)
    print(report.summary(), file=sys.stderr)
    print(target)


@data_app.command()
def split(
    source: Path,
    test: Annotated[float, typer.Option(help="share of rows in the test part")] = 0.3,
    group_by: Annotated[
        str, typer.Option(help="rows that share it stay together: question, or a field's name")
    ] = "question",
    repeats: Annotated[
        str, typer.Option(help="a question with several answers: keep them all, or only the longest")
    ] = "keep",
    seed: Annotated[int, typer.Option()] = 0,
    row_format: FormatOption = "auto",
    to: FormOption = "messages",
    system: SystemOption = "",
    as_json: JsonOption = False,
) -> None:
    """Write NAME-train and NAME-test beside the file; no question stands on both sides."""
    from course_lib.data.split import split_file

    done = split_file(
        source, test=test, group_by=group_by, repeats=repeats, seed=seed, row_format=row_format, to=to, system=system
    )
    print(done.report.summary(), file=sys.stderr)
    print(f"{done.groups} questions; {len(done.repeated)} rows repeat one", file=sys.stderr)
    if as_json:
        _print_json(
            {
                "train": str(done.train),
                "test": str(done.test),
                "train_rows": done.train_rows,
                "test_rows": done.test_rows,
                "groups": done.groups,
                "repeated_rows": done.repeated,
                "rows": done.report.read,
                "kept": done.report.kept,
                "dropped_rows": done.report.dropped,
            }
        )
    else:
        print(f"{done.train}  {done.train_rows} rows\n{done.test}  {done.test_rows} rows")


@data_app.command()
def download(
    name: Annotated[str | None, typer.Argument(help="a data set; without one, all are listed")] = None,
    mirror: Annotated[str | None, typer.Option("--from", help="one mirror, to try no other")] = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a data set into the cache, resumed where it broke off, and print the path of its file."""
    from course_lib.data.sources import download_source, find_source, sources

    if name is None:
        _print_sources([asdict(source) for source in sources().values()], as_json=as_json)
        return
    source = find_source(name)
    print(f"{source.title}\norigin: {source.origin}\nlicence: {source.licence}", file=sys.stderr)
    path = download_source(name, mirror=mirror, say=lambda line: print(line, file=sys.stderr))
    if as_json:
        _print_json({**asdict(source), "path": str(path)})
    else:
        print(path)


def _print_sources(entries: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        _print_json(entries)
        return
    table = Table("name", "MB", "mirrors", "licence", "what", box=None, pad_edge=False)
    for entry in entries:
        megabytes = f"{entry['size'] / 1e6:.1f}" if entry["size"] else "?"
        table.add_row(entry["name"], megabytes, ", ".join(entry["mirrors"]), entry["licence"], entry["title"])
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=1))
