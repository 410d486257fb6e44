"""What the setup cell of a notebook does: choose the scale, say what it means and how long the notebook takes, keep outputs quiet."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from course_lib.errors import CourseError
from course_lib.files import read_text
from course_lib.scale import DEFAULT_MODEL, Scale, current_scale

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

RUN_TIMES = Path(__file__).parents[1] / "benchmarks" / "results" / "notebook_times.json"

SCALE_MEANING: dict[str, str] = {
    "tiny": "a random model of two layers, for tests; what it says means nothing",
    "cpu": "a small model on the processor; no GPU needed",
    "gpu": "a large model in 4 bits a weight, on one NVIDIA GPU",
}
FIGURE_DEFAULTS: dict[str, Any] = {
    "figure.dpi": 100,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class RunTime(TypedDict):
    """One measured run of a notebook. `machine` is as `machine_name` gives it, `date` is YYYY-MM-DD."""

    notebook: str
    scale: str
    machine: str
    seconds: float
    date: str


def start(notebook: str) -> str:
    """Set a notebook up and return its scale; print the scale, its model, and the measured run times of this notebook.

    `notebook` is its file name without ending. Progress bars of transformers and tqdm are off from here on: a committed notebook
    would keep every state of them.

    Raises:
        InputError: `COURSE_SCALE` is none of tiny, cpu, gpu.
    """
    quiet_progress_bars()
    draw_figures_inline()
    scale = current_scale()
    print(setup_text(notebook, scale, read_run_times()))
    return scale


def setup_text(notebook: str, scale: Scale, run_times: Sequence[RunTime]) -> str:
    """Return the block that `start` prints."""
    from course_lib.models import find_model

    model = find_model(DEFAULT_MODEL[scale])
    rows = [run for run in run_times if run["notebook"] == notebook]
    lines = [
        f"scale      {scale}: {SCALE_MEANING[scale]}",
        f"model      {model.name}, {model.parameters} parameters",
        f"machine    {machine_name()}",
        "",
    ]
    if not rows:
        return "\n".join([*lines, "run time   not measured yet on any machine"])
    width = max(len("machine"), *(len(run["machine"]) for run in rows))
    lines += [
        "run time   measured for the whole notebook:",
        f"           {'scale':5}  {'machine':{width}}  {'time':>6}  date",
    ]
    for run in sorted(rows, key=lambda run: (run["scale"], run["seconds"])):
        lines.append(
            f"           {run['scale']:5}  {run['machine']:{width}}  {duration(run['seconds']):>6}  {run['date']}"
        )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Return a run time as a reader wants it: seconds below two minutes, else minutes."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def read_run_times(path: str | Path = RUN_TIMES) -> list[RunTime]:
    """Return every measured run; none when the file is absent (an installed package has none) or damaged."""
    try:
        runs: list[RunTime] = json.loads(read_text(path))
        return [run for run in runs if set(run) >= RunTime.__required_keys__]
    except (CourseError, ValueError, TypeError):
        return []  # a table of run times is no reason to stop a lesson


def machine_name() -> str:
    """Return what the run time depends on most: the GPU's name, else the number of CPU cores this process may use."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{cores} CPU core{'s' if cores > 1 else ''}"


def quiet_progress_bars() -> None:
    """Turn off the progress bars of transformers, huggingface_hub and tqdm."""
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is first imported
    import tqdm.auto
    import tqdm.std

    class Off(tqdm.std.tqdm):
        """In a notebook `tqdm.auto` has a bar that is a widget, and does not heed the variable."""

        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings | {"disable": True})

    tqdm.auto.tqdm = Off
    from transformers.utils import logging

    logging.disable_progress_bar()


def draw_figures_inline() -> None:
    """Set the figure defaults of the course; in a notebook, let a `Figure` that ends a cell show as PNG.

    IPython does that by itself only after `matplotlib.pyplot` is imported, which the notebooks do not need.
    """
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(FIGURE_DEFAULTS)
    # Not imported: outside a notebook IPython need not be installed, and inside one it is there.
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        shell.display_formatter.formatters["image/png"].for_type(Figure, figure_png)


def figure_png(figure: Figure) -> bytes:
    """Return a figure as PNG with at most 32 colours: a quarter of the bytes, and a notebook is committed with its figures."""
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(32, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return small.getvalue()
