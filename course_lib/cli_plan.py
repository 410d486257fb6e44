"""`course plan`: what a training takes of a GPU's memory, before anything is loaded, and what to set where that is too much."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from course_lib.sizes import in_gib, parse_size

if TYPE_CHECKING:
    from course_lib.training.memory_plan import Candidate
    from course_lib.training.memory_prediction import MemoryPrediction

MOST_SHOWN = 6  # candidates; each further one saves more and costs more


def plan(
    recipe: Annotated[str, typer.Argument(help="a shipped recipe's name, or a YAML file")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="override a recipe key; may be given several times"),
    ] = None,
    vram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="memory of the card, such as 8GiB: list the settings that fit")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that train together, each with a copy of the model")] = 1,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="the frozen layers are spread over the GPUs")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Predict a training's GPU memory by part, without loading anything; and say which settings fit."""
    from course_lib.model_shape import ModelShape
    from course_lib.recipe import load_recipe
    from course_lib.training.memory_plan import CARDS, plan_within
    from course_lib.training.memory_prediction import predict_memory

    size = None if vram is None else parse_size(vram, of="--vram", bare=False)
    loaded = load_recipe(recipe, overrides or [])
    shape = ModelShape.of(loaded.model.name)
    prediction = predict_memory(loaded, shape, gpus=gpus, shard=fsdp)
    found: dict[int, list[Candidate]] = {}
    for card in CARDS if size is None else (size,):
        if size or prediction.needed > card:
            found[card] = plan_within(loaded, shape, card, gpus=gpus, shard=fsdp)
        else:
            found[card] = []  # it fits as it is, and nothing more was asked
    if as_json:
        cards = [_card_as_dict(card, prediction, candidates) for card, candidates in found.items()]
        print(json.dumps({"recipe": recipe, "gpus": gpus, **prediction.as_dict(), "cards": cards}, indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 120)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    _print_parts(console, say, prediction, gpus)
    if size is None:
        for card, candidates in found.items():
            say(f"{in_gib(card, 0):>7}  {_verdict(card, prediction, candidates)}")
    else:
        _print_candidates(say, vram or "", prediction, size, found[size])


def _print_parts(console: Console, say: Any, prediction: MemoryPrediction, gpus: int) -> None:
    table = Table(box=None, pad_edge=False)
    for name, side in (("part", "left"), ("GB", "right"), ("GiB", "right"), ("", "left")):
        table.add_column(name, justify=side)
    largest = max(prediction.parts.values())
    for name, size in prediction.parts.items():
        table.add_row(
            name,
            f"{size / 1e9:.2f}",
            f"{size / 2**30:.2f}",
            "█" * round(30 * size / largest),
            style=None if size else "dim",
        )
    peak, at = prediction.peak, f"allocated, at its most: {prediction.moment}"
    table.add_row("peak", f"{peak / 1e9:.2f}", f"{peak / 2**30:.2f}", at, style="bold")
    console.print(table)
    how = "counted tensor by tensor" if prediction.engine == "fused" else f"estimated ({prediction.reason})"
    each = "" if gpus == 1 else f" on each of {gpus} GPUs"
    say(f"\n{prediction.engine} layers, {how}; packs taken as full and wholly trained")
    say(f"the card must have {in_gib(prediction.needed)}{each}: the peak, {prediction.margin}")
    if prediction.host:
        say(f"host memory{each}: {in_gib(prediction.host)} for what is offloaded, and paged optimizer states")
    say("")


def _verdict(card: int, prediction: MemoryPrediction, candidates: list[Candidate]) -> str:
    if prediction.needed <= card:
        return f"fits, {in_gib(card - prediction.needed)} to spare"
    if not candidates:
        return "does not fit with any setting; take a smaller model"
    return f"does not fit; fits with {_settings(candidates[0])} ({_cost(candidates[0])})"


def _print_candidates(
    say: Any, asked: str, prediction: MemoryPrediction, card: int, candidates: list[Candidate]
) -> None:
    as_it_is = "fits" if prediction.needed <= card else "does not fit"
    say(f"{asked.strip()} ({in_gib(card)}): the recipe {as_it_is} as it is")
    others = [candidate for candidate in candidates if candidate.overrides]
    if not others:
        say("no other setting is worth it" if candidates else "nor does it with any setting; take a smaller model")
        return
    say("settings that fit, the fastest first:")
    for candidate in others[:MOST_SHOWN]:
        host = f", {in_gib(candidate.prediction.host)} of host memory" if candidate.prediction.host else ""
        say(f"\n  {_cost(candidate)}, {in_gib(candidate.prediction.needed)}{host}\n  {_settings(candidate)}")


def _cost(candidate: Candidate) -> str:
    other = "" if candidate.trains_the_same else ", and trains something else"
    return f"{candidate.slow_down:.2f}× the time{other}"


def _settings(candidate: Candidate) -> str:
    return " ".join(f"--set {shlex.quote(override)}" for override in candidate.overrides)


def _card_as_dict(card: int, prediction: MemoryPrediction, candidates: list[Candidate]) -> dict[str, Any]:
    return {
        "vram": card,
        "fits": prediction.needed <= card,
        "candidates": [candidate.as_dict() for candidate in candidates[:MOST_SHOWN]],
    }
