"""Pictures of a run, drawn from its metrics."""

from __future__ import annotations

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
        axes.set_title(title, loc="left", fontsize=11)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, atomically."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
