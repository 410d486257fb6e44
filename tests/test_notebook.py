"""What the setup cell of a notebook needs, and what it does without."""

from __future__ import annotations

import subprocess
import sys

from matplotlib.figure import Figure

from course_lib.notebook import figure_png


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
