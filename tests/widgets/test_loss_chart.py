from __future__ import annotations

from pathlib import Path

import pytest

from course_lib.training.events import HeldOutLoss, RunEnded, RunStarted, StepDone
from course_lib.widgets.loss_chart import LossChart


def step(number: int, loss: float) -> StepDone:
    return StepDone(
        step=number,
        total_steps=3,
        epoch=1,
        loss=loss,
        lr=1e-3,
        grad_norm=1,
        tokens=10,
        trained_tokens=5,
        tokens_per_second=100,
        memory_bytes=1,
    )


@pytest.fixture
def chart() -> LossChart:
    chart = LossChart()
    chart(RunStarted(0, 3, 1, 10, 4, 1, 4, "4 rows", "fused layers", "segments", Path("work")))
    return chart


def test_the_chart_follows_the_events(chart: LossChart) -> None:
    for event in (
        HeldOutLoss(0, 3.5),
        step(1, 3.0),
        step(2, 2.5),
        step(3, 2.0),
        RunEnded(3, 9.0, Path("work/adapter")),
    ):
        chart(event)
    assert chart.points == [[1, 3.0], [2, 2.5], [3, 2.0]]
    assert chart.held_out == [[0, 3.5]]
    assert chart.status == "done: 3 steps in 9 s"


def test_quick_steps_are_sent_together(chart: LossChart) -> None:
    changes: list = []
    chart.observe(lambda change: changes.append(change.new), "points")
    for number in (1, 2, 3):
        chart(step(number, 1.0))
    assert len(changes) == 2  # the first at once, the rest with the last step
    assert len(chart.points) == 3


def test_a_second_run_starts_the_chart_anew(chart: LossChart) -> None:
    chart(step(3, 1.0))
    chart(RunStarted(0, 5, 1, 10, 4, 1, 4, "4 rows", "fused layers", "segments", Path("work")))
    assert chart.points == []
    assert chart.total_steps == 5


def test_the_saved_notebook_shows_a_note_before_and_a_picture_after(chart: LossChart) -> None:
    before, _ = chart._repr_mimebundle_()
    assert "later cell" in before["text/html"]
    chart(step(3, 1.0))
    after, _ = chart._repr_mimebundle_()
    assert "data:image/png;base64," in after["text/html"]
    assert after["text/plain"].startswith("LossChart: step 3 of 3")


def test_assets_come_from_no_network() -> None:
    for asset in Path(__file__).parents[2].joinpath("course_lib/widgets").glob("*.[jc]s*"):
        assert "http" not in asset.read_text(encoding="utf-8").replace("http://www.w3.org", ""), asset
