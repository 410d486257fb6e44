from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from matplotlib import font_manager

from course_lib.plots import drawable, loss_figure, save_figure

EVENTS = [
    {"event": "StepDone", "step": 1, "loss": 2.0},
    {"event": "StepDone", "step": 2, "loss": 1.0},
    {"event": "HeldOutLoss", "step": 0, "loss": 2.5},
]


@pytest.mark.parametrize(
    "title", ["Personal assistant of Ada", "李雷的小助手", "한국어", "🤖", "Élodie – Ωμέγα", "a$^{$b", ""]
)
def test_a_title_in_any_script_is_drawn_without_a_warning(tmp_path: Path, title: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(loss_figure(EVENTS, title=title), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 5_000


def test_without_a_font_the_characters_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = [font for font in font_manager.fontManager.ttflist if font.name == "DejaVu Sans"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", usual)
    assert drawable("Personal assistant of 李雷")[0] == "Personal assistant of ..."
    assert drawable("李雷 and 韩梅梅]")[0] == "... and ...]"
    assert drawable("Ada")[0] == "Ada"


def test_a_font_that_has_the_characters_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its name: here one that comes with matplotlib is taken to have the character, and no other."""
    from course_lib import plots

    real = plots._characters
    wanted = next(font for font in font_manager.fontManager.ttflist if font.name == "STIXGeneral")
    monkeypatch.setattr(
        plots, "_characters", lambda file: real(file) - {ord("李")} | ({ord("李")} if file == wanted.fname else set())
    )
    text, families = drawable("李")
    assert text == "李"
    assert families[-1] == "STIXGeneral"
