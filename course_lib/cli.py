"""`course …`: thin, one function a command. Results go to stdout, progress and errors to stderr.

Exit status: 0 done; 1 the work failed; 2 the input is wrong; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from course_lib.cli_chat import chat
from course_lib.cli_data import data_app
from course_lib.cli_evaluate import evaluate
from course_lib.cli_export import export_app
from course_lib.cli_homework import homework_app
from course_lib.cli_plan import plan
from course_lib.cli_publish import publish
from course_lib.cli_serve import app as web_app
from course_lib.cli_serve import serve
from course_lib.errors import CourseError, InputError
from course_lib.files import WRONG_PLACE

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune, merge and chat with language models, on a laptop or a GPU.",
)
models_app = typer.Typer(no_args_is_help=True, help="The models the course knows.")
recipes_app = typer.Typer(no_args_is_help=True, help="The shipped recipes.")
app.add_typer(models_app, name="models")
app.add_typer(recipes_app, name="recipes")
app.add_typer(data_app, name="data")
app.add_typer(homework_app, name="homework")
app.add_typer(export_app, name="export")

ScaleOption = Annotated[
    str | None, typer.Option("--scale", help="tiny, cpu or gpu; default: COURSE_SCALE, else what the machine has")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="override a recipe key; may be given several times")
]


@app.command()
def quickstart(
    name: Annotated[str, typer.Option(help="whose assistant it becomes")] = "Ada",
    work_dir: Annotated[Path, typer.Option(help="where everything is written")] = Path("work_dirs/quickstart"),
    scale: ScaleOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch a model, ask it who it is, fine-tune it, merge, and ask again: all on this machine."""
    from course_lib.quickstart import comparison_table, quickstart
    from course_lib.training.listeners import TerminalProgress

    with TerminalProgress() as progress:
        result = quickstart(
            name=name,
            scale=scale,
            work_dir=work_dir,
            listeners=[progress],
            say=lambda line: progress.console.print(line, highlight=False, soft_wrap=True),
        )
    if as_json:
        print(result.to_json(), end="")
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(comparison_table(result))
    console.print(
        f"adapter     {result.adapter}\nmerged      {result.merged}\nloss curve  {result.loss_curve}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"talk to it  course chat {result.merged}", highlight=False, soft_wrap=True)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """What this machine has, what works, and how to mend the rest."""
    from course_lib.doctor import examine

    checks = examine()
    if as_json:
        _print_json([check.as_dict() for check in checks])
    else:
        console = Console(width=None if sys.stdout.isatty() else 120)
        table = Table(box=None, pad_edge=False, show_header=False)
        for check in checks:
            table.add_row(
                {"ok": "[green]ok[/]", "absent": "[dim]--[/]", "fault": "[bold red]FAULT[/]"}[check.state],
                check.name,
                check.finding,
            )
            if check.remedy:
                table.add_row("", "", f"[italic]{check.remedy}[/]")
        console.print(table)
    if any(check.state == "fault" for check in checks):
        raise typer.Exit(1)


@models_app.command("list")
def models_list(as_json: JsonOption = False) -> None:
    """Names, sizes, licences, templates and languages."""
    from dataclasses import asdict

    from course_lib.models import catalogue, is_cached

    infos = list(catalogue().values())
    if as_json:
        _print_json([asdict(info) | {"cached": is_cached(info.name)} for info in infos])
        return
    table = Table(box=None, pad_edge=False)
    for column in ("name", "parameters", "licence", "template", "languages", "here"):
        table.add_column(column, no_wrap=column in ("name", "here"))
    for info in infos:
        languages = ", ".join(info.languages[:4]) + (" …" if len(info.languages) > 4 else "")
        table.add_row(
            info.name, info.parameters, info.licence, info.template, languages, "yes" if is_cached(info.name) else ""
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


@models_app.command("fetch")
def models_fetch(
    name: str,
    source: Annotated[str | None, typer.Option(help="hub or modelscope; default: COURSE_SOURCE, else hub")] = None,
) -> None:
    """Fetch a model into the cache and print its folder; a broken download goes on where it stopped."""
    from course_lib.models import fetch

    print(fetch(name, source=source))


@recipes_app.command("list")
def recipes_list(
    pattern: Annotated[str, typer.Option("-p", "--pattern", help="only names that contain this")] = "",
    as_json: JsonOption = False,
) -> None:
    """Names of the shipped recipes."""
    from course_lib.recipe import load_recipe, recipe_names

    names = recipe_names(pattern)
    if as_json:
        _print_json([{"name": name, "description": load_recipe(name).description} for name in names])
    else:
        print(
            "\n".join(names) if names else f"no recipe's name contains {pattern!r}",
            file=sys.stdout if names else sys.stderr,
        )


@recipes_app.command("show")
def recipes_show(name: str, overrides: SetOption = None) -> None:
    """Print a recipe with every key spelt out."""
    from course_lib.recipe import load_recipe

    print(load_recipe(name, overrides or []).to_yaml(), end="")


@recipes_app.command("copy")
def recipes_copy(name: str, folder: Annotated[Path, typer.Argument()] = Path()) -> None:
    """Copy a recipe, comments and all, to edit it."""
    from course_lib.recipe import copy_recipe

    print(copy_recipe(name, folder))


app.command()(plan)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="a shipped recipe's name, or a YAML file")],
    overrides: SetOption = None,
    work_dir: Annotated[Path | None, typer.Option(help="default: work_dirs/RECIPE")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint")] = False,
    gpus: Annotated[int, typer.Option(min=1, help="train on that many GPUs of this machine")] = 1,
    deepspeed: Annotated[
        str | None,
        typer.Option(help="zero1, zero2, zero3, zero2_offload, zero3_offload, or a file of DeepSpeed's settings"),
    ] = None,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="spread the frozen layers over the GPUs")] = False,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="measure where the time of a few steps goes, into profile/ of the work dir"),
    ] = False,
) -> None:
    """Train what a recipe says; prints the adapter's folder.

    Several hosts: start it on each with torchrun, or once with srun.
    """
    from course_lib.recipe import load_recipe
    from course_lib.training.launch import adopt_slurm, is_main_process, is_started, launch

    loaded = load_recipe(recipe, overrides or [])
    folder = work_dir or Path("work_dirs") / Path(recipe).stem
    if deepspeed and fsdp:
        raise InputError("--deepspeed and --fsdp both spread the model over the GPUs: choose one")
    adopt_slurm()
    if gpus > 1 and not is_started():
        raise typer.Exit(launch(sys.argv[1:], gpus=gpus))
    from course_lib.plots import loss_figure, save_figure
    from course_lib.training.listeners import TerminalProgress, read_metrics
    from course_lib.training.loop import train

    with TerminalProgress() if is_main_process() else nullcontext() as progress:
        output = train(
            loaded,
            work_dir=folder,
            resume=resume,
            listeners=[progress] if progress else [],
            resume_hint="go on with the same command and --resume",
            deepspeed=deepspeed,
            shard=fsdp,
            profile=profile,
        )
    if is_main_process():
        save_figure(loss_figure(read_metrics(folder), title=folder.name), folder / "loss.png")
        print(output)


app.command()(evaluate)


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="the base model's name or folder")],
    adapter: Path,
    out: Path,
    max_shard_size: Annotated[str, typer.Option(help="largest file")] = "2GB",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
) -> None:
    """Merge an adapter into its base, shard by shard on the CPU; prints the merged folder."""
    from course_lib.export.merge import merge

    print(merge(base, adapter, out, max_shard_size=max_shard_size, dtype=dtype))


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="an XTuner .pth, a folder of DeepSpeed's, or a checkpoint-NNNNNN")],
    out: Path,
    alpha: Annotated[float | None, typer.Option(help="LoRA's alpha; default: what the checkpoint says")] = None,
    base: Annotated[
        str | None, typer.Option(help="the base's name or folder; default: the one the checkpoint names")
    ] = None,
) -> None:
    """Turn a checkpoint into a PEFT adapter, without running what is in it; prints the folder."""
    from course_lib.export.convert import convert

    converted = convert(checkpoint, out, alpha=alpha, base=base)
    print(converted.summary(), file=sys.stderr)
    print(converted.out)


app.command()(publish)


app.command()(chat)
app.command()(serve)
app.command("app")(web_app)


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=1))


def main() -> None:
    """Run a command; what went wrong becomes one line on stderr and an exit status."""
    try:
        _run(sys.argv[1:])
    except CourseError as error:
        index = int(os.environ.get("RANK", "0"))
        if index and type(error) is not CourseError:
            sys.exit(error.exit_code)  # what every process of a training knows, the first one says
        if index:
            _fail(f"process {index}: {error}", error.exit_code)
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of a pipe left, as `| head` does
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:  # a path that no look at it came back from, such as one of 300 characters
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}", 2 if error.errno in WRONG_PLACE else 1)


def _run(arguments: list[str]) -> None:
    """Run one command.

    Not by calling `app`: typer then draws a box of several lines for a wrong option, and ends on Ctrl-C without a word.
    """
    usage_error = (
        typer.BadParameter.__base__
    )  # typer brings its own copy of click, or the installed one: it exports no base
    assert usage_error is not None
    command = typer.main.get_command(app)
    try:
        with command.make_context("course", arguments) as context:
            command.invoke(context)
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except usage_error as error:
        said = " ".join(error.format_message().split()).rstrip(".")
        if said:  # without arguments the help was printed instead
            of = error.ctx.command_path if error.ctx else "course"
            _fail(f"{said[0].lower() + said[1:]} ({of} --help shows what it takes)", 2)
        sys.exit(2)


def _fail(said: str, status: int) -> NoReturn:
    print(f"course: {said}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
