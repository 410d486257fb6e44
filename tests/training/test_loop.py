from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from course_lib.chat.session import ChatSession, SamplingSettings
from course_lib.errors import CourseError, InputError
from course_lib.files import write_text
from course_lib.models import load_model
from course_lib.training.checkpoint import checkpoints
from course_lib.training.events import CheckpointSaved, HeldOutLoss, RunEnded, RunStarted, SampleAnswers, StepDone
from course_lib.training.fused import FusedEngine
from course_lib.training.interrupt import Interrupted
from course_lib.training.listeners import read_metrics
from course_lib.training.loop import train


def losses(work_dir: Path) -> list[float]:
    return [event["loss"] for event in read_metrics(work_dir) if event["event"] == "StepDone"]


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_run_learns_and_tells_what_it_does(make: Any, tmp_path: Path) -> None:
    events: list = []
    recipe = make(
        data={"held_out": 2},
        training={"checkpoint_every": 2},
        evaluation={"questions": ["hi"], "every": 3, "max_new_tokens": 4},
    )
    adapter = train(recipe, work_dir=tmp_path / "run", listeners=[events.append])
    kinds = [type(event) for event in events]
    assert kinds[:3] == [RunStarted, HeldOutLoss, SampleAnswers]
    assert kinds[-1] is RunEnded
    assert kinds.count(StepDone) == 6
    assert kinds.count(CheckpointSaved) == 3
    assert [event.step for event in events if isinstance(event, HeldOutLoss)] == [0, 3, 6]
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    assert {path.name for path in adapter.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "course.json",
    }
    assert (tmp_path / "run" / "recipe.yaml").exists()


def test_the_gradient_is_never_zero_at_a_logged_step(make: Any, tmp_path: Path) -> None:
    """Invariant 8."""
    train(make(), work_dir=tmp_path / "run")
    norms = [event["grad_norm"] for event in read_metrics(tmp_path / "run") if event["event"] == "StepDone"]
    assert len(norms) == 6
    assert min(norms) > 0


def test_accumulation_changes_nothing(make: Any, tmp_path: Path) -> None:
    """Invariant 4: four micro-batches of one are one of four, though their answers differ in length."""
    results = []
    for batch_size, accumulation in ((4, 1), (1, 4), (2, 2)):
        work_dir = tmp_path / f"{batch_size}x{accumulation}"
        train(
            make(training={"batch_size": batch_size, "accumulation": accumulation, "max_steps": 3}), work_dir=work_dir
        )
        results.append(losses(work_dir))
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert results[2] == pytest.approx(results[0], rel=1e-5)


def test_packing_changes_no_loss_when_a_step_holds_the_same_rows(make: Any, tmp_path: Path) -> None:
    for packing, batch_size in (("none", 12), ("best-fit", 12)):
        train(
            make(data={"packing": packing}, training={"batch_size": batch_size, "max_steps": 3}),
            work_dir=tmp_path / packing,
        )
    assert losses(tmp_path / "best-fit") == pytest.approx(losses(tmp_path / "none"), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw"])
def test_a_resumed_run_ends_bit_identical(make: Any, tmp_path: Path, optimizer: str) -> None:
    """Invariant 5, with dropout, across the end of an epoch, and with sample answers in between."""
    recipe = make(
        lora={"dropout": 0.2},
        training={"max_steps": 8, "batch_size": 2, "checkpoint_every": 2, "optimizer": optimizer},
        evaluation={"questions": ["hi"], "every": 4, "max_new_tokens": 3},
    )
    straight = train(recipe, work_dir=tmp_path / "straight")

    def stop_after_step_5(event: object) -> None:
        if isinstance(event, StepDone) and event.step == 5:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(recipe, work_dir=tmp_path / "resumed", listeners=[stop_after_step_5])
    torch.manual_seed(99)  # a new process would not have the old generator's state
    resumed = train(recipe, work_dir=tmp_path / "resumed", resume=True)
    assert adapter_bytes(resumed) == adapter_bytes(straight)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")


def test_another_seed_gives_another_run(make: Any, tmp_path: Path) -> None:
    first = train(make(), work_dir=tmp_path / "0")
    second = train(make(training={"seed": 1}), work_dir=tmp_path / "1")
    assert adapter_bytes(first) != adapter_bytes(second)


def test_old_checkpoints_go_and_a_damaged_one_is_named(make: Any, tmp_path: Path) -> None:
    train(make(training={"checkpoint_every": 1, "keep_checkpoints": 2}), work_dir=tmp_path / "run")
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [5, 6]
    state = tmp_path / "run" / "checkpoint-000006" / "trainer_state.pt"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(CourseError, match="damaged"):
        train(make(training={"checkpoint_every": 1}), work_dir=tmp_path / "run", resume=True)


def test_a_disk_that_fills_up_leaves_the_earlier_checkpoint_whole(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant 9."""
    real_save = torch.save

    def full_disk(value: Any, path: Any) -> None:
        if value.get("step") == 4:
            raise OSError(28, "No space left on device")
        real_save(value, path)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(CourseError, match="disk is full.*unchanged") as caught:
        train(make(training={"checkpoint_every": 2}), work_dir=tmp_path / "run")
    assert caught.value.exit_code == 1
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [2]
    assert not list((tmp_path / "run").glob(".*part*"))
    monkeypatch.undo()
    train(make(training={"checkpoint_every": 2}), work_dir=tmp_path / "run", resume=True)


def test_a_loss_that_is_nan_stops_the_run_with_its_batch_saved(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_loss, calls = FusedEngine.loss, []

    def broken(model: Any, batch: dict) -> torch.Tensor:
        calls.append(1)
        return real_loss(model, batch) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(FusedEngine, "loss", broken)
    with pytest.raises(CourseError, match=r"step 3: the loss is nan.*bad_batch\.pt") as caught:
        train(make(), work_dir=tmp_path / "run")
    assert caught.value.exit_code == 1
    saved = torch.load(tmp_path / "run" / "bad_batch.pt", weights_only=True)
    assert saved["step"] == 3
    assert saved["batch"]["input_ids"].numel() > 0


@pytest.mark.parametrize("last_step", [3, 6])
def test_interrupt_saves_a_checkpoint_and_says_how_to_go_on(make: Any, tmp_path: Path, last_step: int) -> None:
    """Also in the very last step: what comes after it is held-out loss and saving, left to the resumed run."""
    recipe = make(data={"held_out": 2})

    def interrupt(event: object) -> None:
        if isinstance(event, StepDone) and event.step == last_step:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=rf"after step {last_step} of 6; type resume ") as caught:
        train(recipe, work_dir=tmp_path / "run", listeners=[interrupt], resume_hint="type resume")
    assert caught.value.exit_code == 130
    assert checkpoints(tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()
    interrupted = train(recipe, work_dir=tmp_path / "run", resume=True)
    assert adapter_bytes(interrupted) == adapter_bytes(train(recipe, work_dir=tmp_path / "straight"))
    assert measured(tmp_path / "run") == measured(tmp_path / "straight")


def measured(work_dir: Path) -> list[tuple[str, int, float]]:
    """What a run wrote of its losses, times left out."""
    return [(event["event"], event["step"], event["loss"]) for event in read_metrics(work_dir) if "loss" in event]


@pytest.mark.parametrize(
    ("kind", "step", "error"),
    [
        (HeldOutLoss, 0, KeyboardInterrupt),  # nothing is saved yet
        (CheckpointSaved, 6, Interrupted),
        (HeldOutLoss, 6, Interrupted),
    ],
)
def test_interrupts_outside_the_steps_end_the_run_too(
    make: Any, tmp_path: Path, kind: type, step: int, error: type[BaseException]
) -> None:
    recipe = make(data={"held_out": 2})

    def interrupt(event: object) -> None:
        if isinstance(event, kind) and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # the handler runs between two bytecodes

    with pytest.raises(error):
        train(recipe, work_dir=tmp_path / "run", listeners=[interrupt])
    resumed = train(recipe, work_dir=tmp_path / "run", resume=True)
    assert adapter_bytes(resumed) == adapter_bytes(train(recipe, work_dir=tmp_path / "straight"))
    assert measured(tmp_path / "run") == measured(tmp_path / "straight")


def test_training_works_outside_the_main_thread(make: Any, tmp_path: Path) -> None:
    thread = threading.Thread(target=train, args=(make(),), kwargs={"work_dir": tmp_path / "run"})
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "adapter").is_dir()


def test_full_fine_tuning_trains_and_resumes(make: Any, tmp_path: Path) -> None:
    recipe = make(lora=None, training={"checkpoint_every": 2, "max_steps": 4})
    straight = train(recipe, work_dir=tmp_path / "straight")
    for folder in (tmp_path / "straight").glob("checkpoint-000004"):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    resumed = train(recipe, work_dir=tmp_path / "straight", resume=True)
    assert straight == resumed
    assert (resumed / "model.safetensors").exists()
    assert len(losses(tmp_path / "straight")) == 4


@pytest.mark.parametrize("template", ["auto", "zephyr"])
def test_a_whole_model_is_loaded_from_its_own_folder(make: Any, tmp_path: Path, template: str) -> None:
    recipe = make(lora=None, model={"template": template}, training={"max_steps": 1})
    model, tokenizer = load_model(train(recipe, work_dir=tmp_path / "run"))
    session = ChatSession(model, tokenizer, sampling=SamplingSettings(max_new_tokens=2))
    assert template in ("auto", session.template.name)
    session.ask("hello")


@pytest.mark.parametrize("dtype", ["nf4", "int8", "bfloat16"])
def test_a_quantised_base_trains_on_the_cpu(make: Any, tmp_path: Path, dtype: str) -> None:
    train(make(model={"dtype": dtype}), work_dir=tmp_path / "run")
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    record = json.loads((tmp_path / "run" / "adapter" / "course.json").read_text())
    assert record["dtype"] == dtype


@pytest.mark.parametrize("lora", [{}, None])
def test_gradient_checkpointing_gives_the_same_run(make: Any, tmp_path: Path, lora: dict | None) -> None:
    train(make(lora=lora), work_dir=tmp_path / "whole")
    for layers in (True, 1):
        again = tmp_path / f"again-{layers}"
        train(make(lora=lora, training={"gradient_checkpointing": layers}), work_dir=again)
        assert losses(again) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_some_layers_of_a_model_without_fused_ones_run_again(tiny: Path) -> None:
    from course_lib.models import load_model
    from course_lib.training.plain import PlainEngine

    model, _ = load_model("tiny")
    PlainEngine(model, "for the test", checkpoint=1)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"lora": {"targets": ["q_prog"]}}, r"'q_prog' is no linear layer.*did you mean q_proj"),
        ({"lora": {"r": 10**8}}, r"lora\.r = 100000000: no layer of this model has a rank above 64"),
        ({"data": {"held_out": 3}}, r"data\.held_out = 3 keeps 3 of 12 rows.*set data\.held_out=2 or less"),
        ({"data": {"held_out": 100}}, r"data\.held_out = 100 keeps 11 of 12 rows.*set data\.held_out=2 or less"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    make: Any, tmp_path: Path, sections: dict, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        train(make(**sections), work_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_runs_out_is_one_line(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def too_large(*_: object) -> torch.Tensor:
        raise error

    monkeypatch.setattr(FusedEngine, "loss", too_large)
    with pytest.raises(CourseError, match=r"memory ran out: lower training\.batch_size") as caught:
        train(make(), work_dir=tmp_path / "run")
    assert caught.value.exit_code == 1


def test_saving_a_whole_model_draws_no_bar(make: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = make(lora=None, training={"max_steps": 1})
    train(recipe, work_dir=tmp_path / "run")
    train(recipe, work_dir=tmp_path / "run", resume=True)
    assert capfd.readouterr().err == ""


def test_a_metrics_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    write_text(tmp_path / "metrics.jsonl", '{"event": "StepDone", "step": 1}\n{"event": "Ste')
    assert read_metrics(tmp_path) == [{"event": "StepDone", "step": 1}]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "nf4"])
def test_a_run_killed_while_saving_resumes_bit_identical(make: Any, tmp_path: Path, dtype: str) -> None:
    """SIGKILL at step 10 of 20, in the middle of a checkpoint: the half-written one is not taken for whole."""
    recipe = make(
        model={"dtype": dtype, "double_quant": False}, training={"max_steps": 20, "epochs": 10, "checkpoint_every": 5}
    )
    straight = train(recipe, work_dir=tmp_path / "straight")
    recipe.save(tmp_path / "recipe.yaml")
    script = (
        "import os, signal, torch\n"
        "save = torch.save\n"
        "def kill(value, path):\n"
        "    save(value, path)\n"
        "    if value['step'] == 10: os.kill(os.getpid(), signal.SIGKILL)\n"
        "torch.save = kill\n"
        "from course_lib import load_recipe, train\n"
        f"train(load_recipe({str(tmp_path / 'recipe.yaml')!r}), work_dir={str(tmp_path / 'killed')!r})\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert [step for step, _ in checkpoints(tmp_path / "killed")] == [5]
    time.sleep(0.1)
    resumed = train(recipe, work_dir=tmp_path / "killed", resume=True)
    assert adapter_bytes(resumed) == adapter_bytes(straight)
