"""Run time of every notebook on this machine, at the current scale, for the table that a notebook's setup cell prints.

    python benchmarks/notebook_times.py [00_start_here …] [--notebooks notebooks] [--out benchmarks/results/notebook_times.json]

Each notebook is executed once, from its own folder, in a fresh kernel; the kernel's start counts. The executed notebook is not
saved. The JSON is a list of {"notebook", "scale", "machine", "seconds", "date"}; the entry of the same notebook, scale and machine
is replaced after each notebook, so an interrupted measurement keeps what it has. Exit status 1 when a notebook fails.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from course_lib.files import write_text
from course_lib.notebook import RUN_TIMES, RunTime, machine_name, read_run_times
from course_lib.scale import Scale, current_scale

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
CELL_TIMEOUT = 3600  # seconds


def execute(notebook: Path) -> float:
    """Execute a notebook and return its seconds.

    Raises:
        CellExecutionError, CellTimeoutError, DeadKernelError: a cell failed, took too long, or ended the kernel.
    """
    content = nbformat.read(notebook, as_version=4)
    client = NotebookClient(content, timeout=CELL_TIMEOUT, resources={"metadata": {"path": str(notebook.parent)}})
    started = time.perf_counter()
    client.execute()
    return time.perf_counter() - started


def with_run(runs: Sequence[RunTime], new: RunTime) -> list[RunTime]:
    """Return the runs with a new one in the place of that of the same notebook, scale and machine, in a fixed order."""

    def place(run: RunTime) -> tuple[str, str, str]:
        return run["notebook"], run["scale"], run["machine"]

    return sorted([run for run in runs if place(run) != place(new)] + [new], key=place)


def measure(notebooks: Sequence[Path], scale: Scale, out: Path) -> list[str]:
    """Measure each notebook, write each result at once, and return the names of those that failed."""
    machine = machine_name()
    failed = []
    for notebook in notebooks:
        try:
            seconds = execute(notebook)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            print(f"{notebook.stem}: failed\n{error}", file=sys.stderr)
            failed.append(notebook.stem)
            continue
        print(f"{notebook.stem}: {seconds:.1f} s")
        run = RunTime(
            notebook=notebook.stem,
            scale=scale,
            machine=machine,
            seconds=round(seconds, 1),
            date=datetime.date.today().isoformat(),
        )
        write_text(out, json.dumps(with_run(read_run_times(out), run), indent=1) + "\n")
    return failed


def main() -> int:
    """Measure the notebooks named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks without .ipynb; all when none is named")
    parser.add_argument("--notebooks", type=Path, default=NOTEBOOKS)
    parser.add_argument("--out", type=Path, default=RUN_TIMES)
    arguments = parser.parse_args()
    notebooks = sorted(arguments.notebooks.glob("*.ipynb"))
    unknown = set(arguments.names) - {notebook.stem for notebook in notebooks}
    if unknown:
        parser.error(f"no such notebook in {arguments.notebooks}: {', '.join(sorted(unknown))}")
    if arguments.names:
        notebooks = [notebook for notebook in notebooks if notebook.stem in arguments.names]
    scale = current_scale()
    os.environ["COURSE_SCALE"] = scale  # the kernels inherit it
    return 1 if measure(notebooks, scale, arguments.out) else 0


if __name__ == "__main__":
    raise SystemExit(main())
