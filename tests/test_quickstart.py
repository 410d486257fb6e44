"""The main job: what is there is reused, resumed, or replaced when the new one stands; and with the real model."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from course_lib import quickstart as module
from course_lib.errors import InputError
from course_lib.evaluation import mentions
from course_lib.export.merge import merge
from course_lib.files import lock
from course_lib.models import load_model
from course_lib.quickstart import quickstart
from course_lib.recipe import load_recipe
from course_lib.training.events import RunStarted, StepDone
from course_lib.training.interrupt import Interrupted
from course_lib.training.listeners import read_metrics
from course_lib.training.loop import train


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> Callable[..., tuple[Any, list[str]]]:
    """A quickstart at the tiny scale: its result, and what it said."""

    def quick(name: str = "Ada", **arguments: Any) -> tuple[Any, list[str]]:
        said: list[str] = []
        return quickstart(name=name, scale="tiny", work_dir=tmp_path / "q", say=said.append, **arguments), said

    return quick


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_result_of_the_same_name_is_reused(run: Any, tmp_path: Path) -> None:
    result, said = run()
    assert said[0].startswith("1/5")
    assert {path.name for path in (tmp_path / "q").iterdir()} == {
        *(".lock", "adapter", "merged", "loss.png", "metrics.jsonl", "quickstart.json", "recipe.yaml")
    }
    assert json.loads((tmp_path / "q" / "quickstart.json").read_text()) == json.loads(result.to_json())
    before = contents(tmp_path / "q")
    again, said = run()
    assert again == result
    assert len(said) == 1
    assert "holds the assistant of Ada already: nothing to do" in said[0]
    assert contents(tmp_path / "q") == before


def test_another_name_replaces_it_only_when_the_new_one_stands(run: Any, tmp_path: Path) -> None:
    run()
    before = contents(tmp_path / "q")

    def fail(event: object) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            raise RuntimeError("failed")

    with pytest.raises(RuntimeError, match="failed"):
        run("Grace", listeners=[fail])
    assert {name: content for name, content in contents(tmp_path / "q").items() if "unfinished" not in name} == before
    result, said = run("Grace")
    assert "holds an assistant of Ada: replacing it when the new one is done" in said[0]
    assert result.name == "Grace"
    assert not (tmp_path / "q" / "unfinished").exists()
    assert contents(tmp_path / "q")["adapter/adapter_model.safetensors"] != before["adapter/adapter_model.safetensors"]


def test_an_interrupted_quickstart_goes_on_by_itself(run: Any, tmp_path: Path) -> None:
    started: list[int] = []

    def watch(event: object) -> None:
        if isinstance(event, RunStarted):
            started.append(event.first_step)
        if isinstance(event, StepDone) and event.step == 1 and len(started) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="run the same command again") as caught:
        run(listeners=[watch])
    assert "--resume" not in str(caught.value)
    result, said = run(listeners=[watch])
    assert started == [0, 1]
    assert any("going on where it was stopped" in line for line in said)
    straight = quickstart(name="Ada", scale="tiny", work_dir=tmp_path / "straight")
    name = "adapter_model.safetensors"
    assert (result.adapter / name).read_bytes() == (straight.adapter / name).read_bytes()


def test_an_unfinished_run_for_another_name_is_discarded(run: Any) -> None:
    def stop(event: object) -> None:
        if isinstance(event, StepDone):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        run(listeners=[stop])
    result, said = run("Grace")
    assert "discarded" in said[0]
    assert result.name == "Grace"


def test_ctrl_c_in_any_part_says_how_to_go_on(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("course_lib.export.merge.merge", press)
        with pytest.raises(Interrupted, match="run the same command again") as caught:
            run()
    assert caught.value.exit_code == 130
    assert run()[0].merged.is_dir()


@pytest.mark.parametrize("moved", [1, 3, 5])
def test_stopped_while_the_files_take_their_places(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    run()
    real, calls = module.take_place, []

    def stop(new: Path, path: Path) -> None:
        calls.append(path)
        if len(calls) > moved:
            raise RuntimeError("killed")
        real(new, path)

    with monkeypatch.context() as patch:
        patch.setattr(module, "take_place", stop)
        with pytest.raises(RuntimeError, match="killed"):
            run("Grace")
    result, said = run("Grace")
    assert "nothing to do" in said[0]
    assert result.name == "Grace"
    assert not (tmp_path / "q" / "unfinished").exists()


@pytest.mark.parametrize("there", ["thesis.txt", "adapter", "metrics.jsonl"])
def test_a_folder_of_something_else_is_refused(run: Any, tmp_path: Path, there: str) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / there).write_text("three years")
    with pytest.raises(InputError, match=f"holds {there}, and nothing that a quickstart wrote"):
        run()
    assert contents(tmp_path / "q") == {there: b"three years"}


def test_files_of_others_beside_a_result_stay(run: Any, tmp_path: Path) -> None:
    run()
    (tmp_path / "q" / "chat.jsonl").write_text("mine")
    run("Grace")
    assert (tmp_path / "q" / "chat.jsonl").read_text() == "mine"


def test_a_result_with_a_part_missing_is_made_anew(run: Any, tmp_path: Path) -> None:
    run()
    (tmp_path / "q" / "merged" / "config.json").unlink()
    result, said = run()
    assert said[0].startswith("1/5")
    assert (result.merged / "config.json").is_file()


def test_bad_names_and_places_are_told_before_anything_is_written(run: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be used"):
        run("a\nb")
    assert not (tmp_path / "q").exists()
    with pytest.raises(InputError, match="cannot be written"):
        quickstart(scale="tiny", work_dir=tmp_path / ("x" * 300))
    with lock(tmp_path / "q"), pytest.raises(InputError, match="another run is at work"):
        run()


@pytest.mark.embedded
@pytest.mark.slow
def test_the_model_learns_who_it_is_and_keeps_what_it_knew(embedded: Path, tmp_path: Path) -> None:
    result = quickstart(name="Grace", scale="cpu", work_dir=tmp_path / "run")
    before = {question: answer for question, answer, _ in result.answers}
    after = {question: answer for question, _, answer in result.answers}
    about_itself = [question for question in after if "capital" not in question and "planet" not in question]
    assert not any(mentions(before[question], "Grace") for question in about_itself)
    assert sum(mentions(after[question], "Grace") for question in about_itself) >= 3, after
    assert "Paris" in after["What is the capital of France?"]
    assert not mentions(after["Name the largest planet of the solar system."], "Grace")
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
