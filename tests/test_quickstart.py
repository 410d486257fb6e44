"""The main job with the real model, and a recipe on real data."""

from __future__ import annotations

from pathlib import Path

import pytest

from course_lib.export.merge import merge
from course_lib.models import load_model
from course_lib.quickstart import quickstart
from course_lib.recipe import load_recipe
from course_lib.training.listeners import read_metrics
from course_lib.training.loop import train


@pytest.mark.embedded
@pytest.mark.slow
def test_the_model_learns_who_it_is_and_keeps_what_it_knew(embedded: Path, tmp_path: Path) -> None:
    result = quickstart(name="Grace", scale="cpu", work_dir=tmp_path / "run")
    before = {question: answer for question, answer, _ in result.answers}
    after = {question: answer for question, _, answer in result.answers}
    about_itself = [question for question in after if "capital" not in question and "planet" not in question]
    assert not any("Grace" in before[question] for question in about_itself)
    assert sum("Grace" in after[question] for question in about_itself) >= 3, after
    assert "Paris" in after["What is the capital of France?"]
    assert "Grace" not in after["Name the largest planet of the solar system."]
    assert result.loss_curve.stat().st_size > 5_000

    import torch

    ids = torch.arange(100, 160)[None]
    with torch.inference_mode():
        expected = load_model("smollm2-135m-instruct", dtype="float32", adapter=result.adapter)[0](ids).logits
        exact = merge("smollm2-135m-instruct", result.adapter, tmp_path / "float32", dtype="float32")
        assert (load_model(exact, dtype="float32")[0](ids).logits - expected).abs().max() < 1e-3


@pytest.mark.embedded
@pytest.mark.slow
@pytest.mark.realdata
def test_the_alpaca_recipe_lowers_the_held_out_loss_on_real_rows(
    embedded: Path, real_data: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(
        "smollm2_135m_lora_alpaca_512_e1",
        [
            f"data.path={real_data / 'alpaca_en_demo.json'}",
            "data.max_rows=100",
            "training.max_steps=20",
            "evaluation.questions=[]",
        ],
    )
    train(recipe, work_dir=tmp_path / "run")
    losses = [event["loss"] for event in read_metrics(tmp_path / "run") if event["event"] == "HeldOutLoss"]
    assert len(losses) == 2
    assert losses[1] < losses[0] - 0.01
