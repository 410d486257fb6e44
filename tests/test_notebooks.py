"""What must hold of every notebook before it is run; `make test` executes and compares them with nbval."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from course_lib.notebook import duration, read_run_times, setup_text

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS][:1] == ["00"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_run_clean_and_small(path: Path) -> None:
    assert path.stat().st_size < 150_000
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in notebook["metadata"], "GitHub refuses a notebook with widget state"
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert 25 <= len(code) <= 60
    numbers = [cell["execution_count"] for cell in code]
    assert numbers == list(range(1, len(code) + 1)), "run from top to bottom in a fresh kernel"
    for cell in code:
        source = "".join(cell["source"])
        assert not source.lstrip().startswith(("!", "%")), "no shell magics"
        assert "pip install" not in source
        assert not [output for output in cell["outputs"] if output["output_type"] == "error"]
        for folder in (str(ROOT.parent) + "/", str(Path.home()) + "/", "/tmp/"):
            assert folder not in json.dumps(cell["outputs"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_setup_cell_names_its_own_notebook(path: Path) -> None:
    assert f'start("{path.stem}")' in path.read_text(encoding="utf-8").replace('\\"', '"')


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_run_time_was_measured(path: Path) -> None:
    assert path.stem in {run["notebook"] for run in read_run_times()}


def test_the_setup_text_says_what_the_dial_chose_and_how_long_it_takes() -> None:
    runs = [{"notebook": "00", "scale": "cpu", "machine": "2 CPU cores", "seconds": 91.0, "date": "2026-11-24"}]
    text = setup_text("00", "cpu", runs)
    assert "smollm2-135m-instruct" in text
    assert duration(91.0) in text
    assert "not measured yet" in setup_text("01", "cpu", runs)
