"""`course evaluate`: a model on rows it was not trained on, beside what it was before."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from course_lib.errors import InputError

if TYPE_CHECKING:
    from course_lib.comparison import Evaluation
    from course_lib.evaluation import Progress

SHOWN = 3  # answers


def evaluate(
    model: Annotated[str, typer.Argument(help="a model's name or folder")],
    data: Annotated[
        str,
        typer.Option(
            help="rows of any format: FILE, sample:FILE, hf://…; or a recipe's YAML, for the rows it holds out"
        ),
    ],
    adapter: Annotated[
        Path | None, typer.Option(help="an adapter's folder; the model without it is measured first")
    ] = None,
    compare_with: Annotated[
        str | None,
        typer.Option(metavar="OTHER", help="what comes before instead: another model, or adapter of this one"),
    ] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="read that many rows of the file")] = None,
    generate: Annotated[int, typer.Option(min=0, metavar="N", help="rows that are answered; 0: losses alone")] = 20,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="where an answer is cut")] = 200,
    max_length: Annotated[int, typer.Option(min=8, help="tokens of a row that are read")] = 2048,
    bits: Annotated[int | None, typer.Option(help="load the model in 4 or 8 bits")] = None,
    template: Annotated[str, typer.Option(help="chat template; auto takes the adapter's or the model's own")] = "auto",
    protocol: Annotated[
        str,
        typer.Option(help="how tool calls are written; auto takes the adapter's, the recipe's or the template's own"),
    ] = "auto",
    row_format: Annotated[str, typer.Option("--format", help="the rows' format; auto tells by their keys")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, every row's results in it")] = False,
) -> None:
    """Loss, perplexity and answers on held-out rows and on general knowledge; with --adapter, before and after.

    Of rows with tools every call and every answer is asked for, each after all turns before it.
    """
    from course_lib.adapter_record import check_adapter, recorded_protocol, recorded_template
    from course_lib.agent.evaluation import step_table
    from course_lib.agent.protocol import choose_protocol
    from course_lib.comparison import compare
    from course_lib.data.dataset import read_conversations
    from course_lib.evaluation import evaluate, evaluate_general_knowledge
    from course_lib.models import model_folder

    if bits not in (None, 4, 8):
        raise InputError(f"--bits {bits}: choose 4 or 8")
    settings = _settings(data, row_format=row_format, max_rows=max_rows)
    rows, report = read_conversations(settings)
    print(report.summary(), file=sys.stderr)
    sides: dict[str, tuple[str, Path | None]] = {"before": (model, None)} if adapter is not None else {}
    if compare_with is not None:
        is_adapter = (Path(compare_with) / "adapter_config.json").is_file()
        sides = {"before": (model, Path(compare_with)) if is_adapter else (compare_with, None)}
    sides["after"] = (model, adapter)
    for base, with_adapter in sides.values():  # before the first is measured: what cannot be loaded is soon told
        folder = model_folder(base)
        if with_adapter is not None:
            check_adapter(with_adapter, folder)
    held_out: dict[str, Evaluation] = {}
    general: dict[str, Evaluation] = {}
    chosen = recorded_template(adapter, template)
    if protocol == "auto" and (protocol := recorded_protocol(model, adapter)) == "auto":
        protocol = settings.protocol
    for name, (base, with_adapter) in sides.items():
        with _loaded(base, with_adapter, bits=bits, template=chosen) as loaded, _progress(name) as progress:
            limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "max_length": max_length}
            written_by = choose_protocol(protocol, loaded["template"], loaded["tokenizer"])
            held_out[name] = evaluate(
                **loaded, rows=rows, protocol=written_by, generate=generate, progress=progress, **limits
            )
            general[name] = evaluate_general_knowledge(**loaded, generate=generate > 0, progress=progress)
    sets = {"held_out": held_out, "general": general}
    if as_json:
        result: dict[str, Any] = {"model": model, "adapter": adapter and str(adapter), "data": data}
        for name, of_set in sets.items():
            result[name] = {side: evaluation.as_dict() for side, evaluation in of_set.items()}
            if len(of_set) == 2:
                result[name]["changes"] = compare(of_set["before"], of_set["after"]).as_dict()
        print(json.dumps(result, ensure_ascii=False, indent=1))
        return
    for title, of_set in (("held-out rows", held_out), ("general knowledge", general)):
        table = compare(of_set["before"], of_set["after"]) if len(of_set) == 2 else of_set["after"]
        print(f"{title}: {table}\n")
    for name, evaluation in held_out.items():
        if any(row.steps for row in evaluation.rows):
            print(f"{name}: {step_table(evaluation)}\n")
    for number, answer in enumerate(held_out["after"].answers[:SHOWN]):
        print(f"question   {_short(answer.question)}\nreference  {_short(answer.reference)}")
        for name, evaluation in held_out.items():
            print(f"{name if len(held_out) == 2 else 'answer':<9}  {_short(evaluation.answers[number].text)}")
        print()
    steps = {name: [step for row in evaluation.rows for step in row.steps] for name, evaluation in held_out.items()}
    for number, step in enumerate(steps["after"][:SHOWN]):
        print(f"question   {_short(step.question)}\nexpected   {_short(step.expected)}")
        for name, taken in steps.items():
            print(f"{name if len(steps) == 2 else 'written':<9}  {_short(taken[number].text)}")
        print()


def _settings(data: str, *, row_format: str, max_rows: int | None) -> Any:
    """The data settings of a recipe's YAML; of a file, all of whose rows are measured, those with `held_out` 0."""
    from course_lib.recipe import DataSettings, load_recipe

    if data.endswith((".yaml", ".yml")):
        settings = load_recipe(data).data
        if not settings.held_out:
            raise InputError(
                f"{data}: holds no rows out (data.held_out = 0); name a file of rows that were not trained on"
            )
        if max_rows is not None or row_format != "auto":
            raise InputError(f"{data}: a recipe says which rows it holds out; leave out --max-rows and --format")
        return settings
    return DataSettings(path=data, format=row_format, max_rows=max_rows, on_bad_row="drop")


@contextmanager
def _loaded(model: str, adapter: Path | None, *, bits: int | None, template: str) -> Iterator[dict[str, Any]]:
    """Model, tokenizer and template by name; gone from memory afterwards, so that the next one has room."""
    import gc

    import torch

    from course_lib.data.templates import choose_template
    from course_lib.models import load_model

    loaded, tokenizer = load_model(model, dtype={None: "auto", 4: "nf4", 8: "int8"}[bits], adapter=adapter)
    parts = {"model": loaded, "tokenizer": tokenizer, "template": choose_template(tokenizer, template)}
    del loaded
    try:
        yield parts
    finally:
        parts.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def _progress(side: str) -> Iterator[Progress]:
    """A bar on stderr, for losses and for answers; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    with Bars(console=console, disable=not console.is_terminal) as bars:
        tasks: dict[tuple[str, int], Any] = {}

        def tell(part: str, done: int, total: int) -> None:
            if (part, total) not in tasks:
                tasks[part, total] = bars.add_task(f"{side}: {part}", total=total)
            bars.update(tasks[part, total], completed=done)

        yield tell


def _short(text: str, most: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[:most] + " …"
