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

from course_lib.errors import CourseError, InputError
from course_lib.files import write_text
from course_lib.training import loop
from course_lib.training.checkpoint import checkpoints
from course_lib.training.events import CheckpointSaved, HeldOutLoss, RunEnded, RunStarted, SampleAnswers, StepDone
from course_lib.training.listeners import read_metrics
from course_lib.training.loop import Interrupted, train


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


def test_resume_refuses_another_recipe(make: Any, tmp_path: Path) -> None:
    train(make(), work_dir=tmp_path / "run")
    with pytest.raises(InputError, match=r"training\.lr was 0\.005 and is 0\.1"):
        train(make(training={"lr": 0.1}), work_dir=tmp_path / "run", resume=True)


def test_an_earlier_run_is_not_overwritten_unasked(make: Any, tmp_path: Path) -> None:
    adapter = train(make(), work_dir=tmp_path / "run")
    before = adapter_bytes(adapter)
    with pytest.raises(InputError, match="already holds a run"):
        train(make(), work_dir=tmp_path / "run")
    assert adapter_bytes(adapter) == before


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
    real_loss, calls = loop.supervised_loss, []

    def broken(model: Any, batch: dict) -> torch.Tensor:
        calls.append(1)
        return real_loss(model, batch) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(loop, "supervised_loss", broken)
    with pytest.raises(CourseError, match=r"step 3: the loss is nan.*bad_batch\.pt") as caught:
        train(make(), work_dir=tmp_path / "run")
    assert caught.value.exit_code == 1
    saved = torch.load(tmp_path / "run" / "bad_batch.pt", weights_only=True)
    assert saved["step"] == 3
    assert saved["batch"]["input_ids"].numel() > 0


def test_interrupt_saves_a_checkpoint_and_says_how_to_go_on(make: Any, tmp_path: Path) -> None:
    def interrupt(event: object) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=r"after step \d of 6.*--resume"):
        train(make(), work_dir=tmp_path / "run", listeners=[interrupt])
    assert checkpoints(tmp_path / "run")
    interrupted = train(make(), work_dir=tmp_path / "run", resume=True)
    assert adapter_bytes(interrupted) == adapter_bytes(train(make(), work_dir=tmp_path / "straight"))


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


@pytest.mark.parametrize("dtype", ["nf4", "int8", "bfloat16"])
def test_a_quantised_base_trains_on_the_cpu(make: Any, tmp_path: Path, dtype: str) -> None:
    train(make(model={"dtype": dtype}), work_dir=tmp_path / "run")
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    record = json.loads((tmp_path / "run" / "adapter" / "course.json").read_text())
    assert record["dtype"] == dtype


def test_gradient_checkpointing_gives_the_same_run(make: Any, tmp_path: Path) -> None:
    train(make(), work_dir=tmp_path / "plain")
    train(make(training={"gradient_checkpointing": True}), work_dir=tmp_path / "recomputed")
    assert losses(tmp_path / "recomputed") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_lora_targets_that_do_not_exist_are_refused(make: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'q_prog' is no linear layer.*did you mean q_proj"):
        train(make(lora={"targets": ["q_prog"]}), work_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_metrics_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    write_text(tmp_path / "metrics.jsonl", '{"event": "StepDone", "step": 1}\n{"event": "Ste')
    assert read_metrics(tmp_path) == [{"event": "StepDone", "step": 1}]


@pytest.mark.slow
def test_a_run_killed_while_saving_resumes_bit_identical(make: Any, tmp_path: Path) -> None:
    """SIGKILL in the middle of a checkpoint: the half-written one is not taken for whole."""
    recipe = make(training={"max_steps": 8, "checkpoint_every": 2})
    straight = train(recipe, work_dir=tmp_path / "straight")
    recipe.save(tmp_path / "recipe.yaml")
    script = (
        "import os, signal, torch\n"
        "save = torch.save\n"
        "def kill(value, path):\n"
        "    save(value, path)\n"
        "    if value['step'] == 6: os.kill(os.getpid(), signal.SIGKILL)\n"
        "torch.save = kill\n"
        "from course_lib import load_recipe, train\n"
        f"train(load_recipe({str(tmp_path / 'recipe.yaml')!r}), work_dir={str(tmp_path / 'killed')!r})\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert [step for step, _ in checkpoints(tmp_path / "killed")] == [2, 4]
    time.sleep(0.1)
    resumed = train(recipe, work_dir=tmp_path / "killed", resume=True)
    assert adapter_bytes(resumed) == adapter_bytes(straight)
