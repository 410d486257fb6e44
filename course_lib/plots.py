"""Pictures of a run, drawn from its metrics."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loss_figure(events: Sequence[dict[str, Any]], *, title: str = "") -> Figure:
    """Training loss by step, and held-out loss where it was measured, from the events of `read_metrics`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = [event for event in events if event["event"] == "StepDone"]
    held_out = [event for event in events if event["event"] == "HeldOutLoss"]
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([e["step"] for e in steps], [e["loss"] for e in steps], color="#1f6fb4", linewidth=1.6, label="training")
    if held_out:
        axes.plot(
            [e["step"] for e in held_out],
            [e["loss"] for e in held_out],
            "o--",
            color="#b4541f",
            markersize=5,
            label="held-out rows",
        )
        axes.legend(frameon=False)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per trained token)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#8884", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        text, families = drawable(title)
        axes.set_title(text, loc="left", fontsize=11, fontfamily=families, parse_math=False)
    return figure


def drawable(text: str) -> tuple[str, list[str]]:
    """The text and the font families to draw it in, such that no character comes out as an empty box.

    The usual font has no Chinese, Japanese or Korean; where no font of the machine has what it lacks, those characters become "...".
    """
    from matplotlib import font_manager, rcParams

    usual = list(rcParams["font.family"])
    missing = {ord(character) for character in text if not character.isspace()} - _characters(
        font_manager.findfont(font_manager.FontProperties(family=usual))
    )
    if not missing:
        return text, usual
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: (not _LIKELY.search(font.name), font.name)):
        if missing <= _characters(font.fname):
            return text, [*usual, font.name]
    return re.sub(f"[{re.escape(''.join(map(chr, sorted(missing))))}]+", "...", text), usual


# names of fonts with Chinese characters, looked into first: opening all fonts of a machine takes a while
_LIKELY = re.compile(r"CJK|Han|Hei|Song|Noto Sans SC|PingFang|YaHei|Gothic|WenQuanYi|Droid Sans Fallback|Unicode")


@functools.cache
def _characters(font_file: str) -> frozenset[int]:
    """Code points that a font file has; none for one that cannot be read."""
    from matplotlib import font_manager

    try:
        return frozenset(font_manager.get_font(font_file).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, atomically."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
