"""What the setup cell of a notebook needs, and what it does without."""

from __future__ import annotations

import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from course_lib.notebook import figure_png, quiet_progress_bars


def test_the_setup_cell_needs_nothing_that_the_base_does_not_declare() -> None:
    """IPython comes with the extra `lab`; a script may import the same module without it."""
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] in ('IPython', 'ipywidgets', 'anywidget'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from course_lib.notebook import start\n"
        "assert start('00_start_here') == 'tiny'\n"
    )
    environment = {"COURSE_SCALE": "tiny", "PATH": "", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "scale      tiny" in ended.stdout


def test_a_figure_is_drawn_small() -> None:
    figure = Figure(figsize=(4, 3))
    figure.subplots().plot([1, 2, 1])
    png = figure_png(figure)
    assert png.startswith(b"\x89PNG")
    assert len(png) < 20_000


def test_bars_of_tqdm_are_off_in_a_notebook_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """There `tqdm.auto` has a bar that is a widget; a committed notebook would keep it."""
    import tqdm.auto
    import tqdm.notebook

    monkeypatch.setattr(tqdm.auto, "tqdm", tqdm.notebook.tqdm)
    monkeypatch.setenv("TQDM_DISABLE", "")
    quiet_progress_bars()
    from tqdm.auto import tqdm as bar

    assert bar(range(3), disable=False).disable
