"""`course export …`: models and adapters in other programs' forms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

export_app = typer.Typer(no_args_is_help=True, help="Models and adapters in other programs' forms.")


@export_app.command("original")
def export_original(
    adapter: Path,
    out: Path,
    base: Annotated[
        str | None, typer.Option(help="the base's name or folder; default: the one the adapter names")
    ] = None,
) -> None:
    """Write an InternLM adapter for the module names of its own code; prints the folder."""
    from course_lib.internlm.adapter import export_original

    print(export_original(adapter, out, base=base))


@export_app.command("gguf")
def export_gguf(
    model: Annotated[str, typer.Argument(help="a whole model's name or folder; merge an adapter first")],
    out: Annotated[Path, typer.Argument(help="the file to write, *.gguf; a Modelfile comes beside it")],
    number_format: Annotated[str, typer.Option("--type", help="f32, f16, bf16, q8_0 or q4_0")] = "q8_0",
) -> None:
    """Write a model as a GGUF file for llama.cpp and Ollama, with its tokenizer and chat template; prints the file."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from course_lib.export.gguf import export_gguf

    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)
        written = export_gguf(
            model, out, type=number_format, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    print(written)
