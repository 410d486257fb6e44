"""Two processes against one: on a CPU through gloo, started as torchrun starts them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from course_lib.errors import InputError
from course_lib.recipe import Recipe
from course_lib.training import launch
from course_lib.training.batches import plan_steps
from course_lib.training.distributed import BUCKET, _buckets
from course_lib.training.listeners import read_metrics
from course_lib.training.loop import train

pytestmark = pytest.mark.slow


def course_train(recipe: Recipe, work_dir: Path, *more: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """`course train` in several processes."""
    with started(recipe, work_dir, *more, processes=processes) as running:
        out, err = running.communicate(timeout=240)
    return subprocess.CompletedProcess(running.args, running.returncode, out, err)


def started(recipe: Recipe, work_dir: Path, *more: str, processes: int = 2) -> subprocess.Popen[str]:
    file = work_dir.with_suffix(".yaml")
    recipe.save(file)
    code = (
        "import sys; from course_lib.training import launch; import torch; torch.cuda.device_count = lambda: 8\n"
        "from course_lib import cli; cli.main()"
    )
    command = [sys.executable, "-c", code, "train", str(file), "--work-dir", str(work_dir), "--gpus", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, *more], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def losses(work_dir: Path, event: str = "StepDone") -> list[float]:
    return [found["loss"] for found in read_metrics(work_dir) if found["event"] == event]


def adapter_difference(one: Path, other: Path) -> float:
    first, second = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (one, other))
    return max(((first[name] - second[name]).norm() / first[name].norm()).item() for name in first)


@pytest.fixture
def recipe(make: Any) -> Recipe:
    """Nine rows to train on, four a step: two micro-batches for each of two processes, and in an epoch's last step one for both."""
    return make(
        data={"max_rows": 11, "held_out": 2},
        training={"accumulation": 4, "batch_size": 1, "max_steps": 6, "optimizer": "adamw", "checkpoint_every": 4},
        evaluation={"questions": ["hi"], "max_new_tokens": 3, "every": 3},
    )


@pytest.mark.parametrize("more", [[], ["--fsdp"]])
def test_two_processes_take_the_steps_of_one(recipe: Recipe, tmp_path: Path, more: list[str]) -> None:
    train(recipe, work_dir=tmp_path / "one")
    two = course_train(recipe, tmp_path / "two", *more)
    assert two.returncode == 0, two.stderr
    assert two.stdout == f"{tmp_path / 'two' / 'adapter'}\n"  # said once
    assert two.stderr.count("step 6/6") == 1
    assert "in 2 processes" in two.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert losses(tmp_path / "two", "HeldOutLoss") == pytest.approx(losses(tmp_path / "one", "HeldOutLoss"), rel=1e-5)
    assert adapter_difference(tmp_path / "one", tmp_path / "two") < 1e-3
    for key in ("tokens", "trained_tokens"):
        counts = [
            [event[key] for event in read_metrics(tmp_path / name) if event["event"] == "StepDone"]
            for name in ("one", "two")
        ]
        assert counts[0] == counts[1]


def test_a_run_of_two_goes_on_with_one_and_back(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe, work_dir=tmp_path / "one")
    assert course_train(recipe, tmp_path / "two").returncode == 0
    for processes in (1, 2):
        shutil.rmtree(tmp_path / "two" / "checkpoint-000006")
        if processes == 1:
            train(recipe, work_dir=tmp_path / "two", resume=True)
        else:
            assert course_train(recipe, tmp_path / "two", "--resume").returncode == 0
        assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
        assert adapter_difference(tmp_path / "one", tmp_path / "two") < 1e-3


@pytest.mark.parametrize(
    ("lora", "more"),
    [({"init": "pissa", "lr_ratio": 4}, []), ({"init": "pissa", "dora": True}, []), ({"init": "olora"}, ["--fsdp"])],
)
def test_changed_weights_are_the_same_in_both(make: Any, tmp_path: Path, lora: dict[str, Any], more: list[str]) -> None:
    sections = {"accumulation": 2, "batch_size": 1, "max_steps": 4, "checkpoint_every": 2}
    recipe = make(lora=lora, training={**sections, "keep_checkpoints": 9})
    train(recipe, work_dir=tmp_path / "one")
    assert course_train(recipe, tmp_path / "two", *more).returncode == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    shutil.rmtree(tmp_path / "two" / "checkpoint-000004")
    assert course_train(recipe, tmp_path / "two", "--resume", *more).returncode == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_eva_is_not_for_layers_in_shards(make: Any, tmp_path: Path) -> None:
    ended = course_train(make(lora={"init": "eva"}, training={"accumulation": 2}), tmp_path / "run", "--fsdp")
    assert ended.returncode == 2
    assert "lora.init = eva runs the whole base, which --fsdp spreads out; set lora.init to default" in ended.stderr


def test_all_weights_train_in_two_processes(make: Any, tmp_path: Path) -> None:
    recipe = make(lora=None, training={"accumulation": 2, "max_steps": 3, "optimizer": "adamw"})
    train(recipe, work_dir=tmp_path / "one")
    assert course_train(recipe, tmp_path / "two").returncode == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_ctrl_c_stops_both_with_a_checkpoint(recipe: Recipe, tmp_path: Path) -> None:
    recipe.training.max_steps, recipe.training.epochs = 100_000, 100_000
    with started(recipe, tmp_path / "run") as running:
        deadline = time.monotonic() + 120
        while len(losses(tmp_path / "run")) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=120)
    assert running.returncode == 130
    said = [line for line in err.splitlines() if line.startswith("course:")]
    assert len(said) == 1
    assert "go on with the same command and --resume" in said[0]
    assert list((tmp_path / "run").glob("checkpoint-*"))


def test_wrong_input_is_said_once(recipe: Recipe, tmp_path: Path) -> None:
    recipe.training.accumulation = 3
    ended = course_train(recipe, tmp_path / "run")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines() == [
        "course: training.accumulation = 3: the micro-batches of a step cannot be shared out evenly among 2 processes; set a "
        "multiple of 2"
    ]
    assert not (tmp_path / "run").exists()


def test_a_process_that_dies_ends_the_others(recipe: Recipe, tmp_path: Path) -> None:
    recipe.training.max_steps, recipe.training.epochs = 100_000, 100_000
    with started(recipe, tmp_path / "run") as running:
        deadline = time.monotonic() + 120
        while len(losses(tmp_path / "run")) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        assert len(children) == 2
        os.kill(int(children[1]), signal.SIGKILL)
        _, err = running.communicate(timeout=120)
    assert running.returncode == 1
    assert "Traceback" not in err
    assert "course: another process of this training has ended; its own message says why" in err


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_zero_takes_the_same_steps_and_goes_on(recipe: Recipe, tmp_path: Path, stage: str) -> None:
    pytest.importorskip("deepspeed")
    train(recipe, work_dir=tmp_path / "one")
    two = course_train(recipe, tmp_path / "two", "--deepspeed", stage)
    assert two.returncode == 0, two.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-3)
    assert adapter_difference(tmp_path / "one", tmp_path / "two") < 1e-3
    shutil.rmtree(tmp_path / "two" / "checkpoint-000006")
    shutil.rmtree(tmp_path / "two" / "adapter")
    resumed = course_train(recipe, tmp_path / "two", "--deepspeed", stage, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-3)
    assert adapter_difference(tmp_path / "one", tmp_path / "two") < 1e-3
    with pytest.raises(InputError, match="was trained by PlainEngine and zero. on 2.*go on as it was begun"):
        train(recipe, work_dir=tmp_path / "two", resume=True)


@pytest.mark.parametrize(
    ("name", "sections", "said"),
    [
        ("zero4", {}, r"zero4: name one of zero1, zero2.*did you mean zero"),
        ("none.json", {}, r"none\.json: no such file"),
        ("zero3", {"model": {"dtype": "nf4"}}, r"tear the quantised weights of model\.dtype=nf4.*--fsdp.*zero2"),
        ("zero2", {"training": {"offload": ["embedding"]}}, r"training\.offload = \['embedding'\].*zero2_offload"),
        ("zero2_offload", {"training": {"optimizer": "adamw_8bit"}}, r"set training\.optimizer=adamw"),
    ],
)
def test_wrong_settings_of_zero(make: Any, tmp_path: Path, name: str, sections: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        train(make(**sections), work_dir=tmp_path / "run", deepspeed=name)


def test_a_file_of_zero_settings(make: Any, tmp_path: Path) -> None:
    from course_lib.training.zero import zero_settings

    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"train_batch_size": "auto"}))
    with pytest.raises(InputError, match=r"mine\.json: has no section zero_optimization"):
        zero_settings(str(file), make())
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "wall_clock_breakdown": True}))
    assert zero_settings(str(file), make())["wall_clock_breakdown"]


@pytest.mark.parametrize("lora", [{}, None])
def test_a_group_of_one_leaves_nothing_behind(make: Any, tmp_path: Path, lora: dict | None) -> None:
    """A run with --fsdp alone, or one that fails so: the next one, and what this process starts, are no part of its group."""
    before = dict(os.environ)
    if lora is None:
        with pytest.raises(InputError, match="--fsdp needs the fused layers"):
            train(make(lora=None), work_dir=tmp_path / "sharded", shard=True)
    else:
        train(make(), work_dir=tmp_path / "sharded", shard=True)
    assert {name for name in os.environ if name not in before} <= {"ACCELERATE_MIXED_PRECISION"}
    train(make(), work_dir=tmp_path / "plain")
    if lora is not None:
        assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "sharded"), rel=1e-5)


def test_more_gpus_than_there_are() -> None:
    import torch

    with pytest.raises(InputError, match=rf"--gpus 99: this machine has {torch.cuda.device_count()} GPU"):
        launch.launch([], gpus=99)


def test_shares_of_a_step_are_all_of_it_once(recipe: Recipe) -> None:
    import datasets
    import numpy as np

    from course_lib.data.examples import Examples

    rows = [[number] * (number + 1) for number in range(11)]
    table = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
    plan = plan_steps(Examples(table, np.arange(11)), recipe.data, recipe.training)
    for step in range(5):
        whole = plan.micro_batches(step)
        for count in (1, 2, 3, 4):
            shares = [plan.micro_batches(step, index=index, count=count) for index in range(count)]
            assert len({len(share) for share in shares}) == 1
            own = [
                share[: len(share) - plan.fillers(step, index=index, count=count)] for index, share in enumerate(shares)
            ]
            assert sorted(map(str, whole)) == sorted(str(batch) for share in own for batch in share)


def test_buckets_keep_order_types_and_size() -> None:
    import torch

    tensors = [torch.empty(size, dtype=kind, device="meta") for size, kind in [
        (3, torch.float32), (4, torch.float32), (5, torch.bfloat16), (BUCKET, torch.bfloat16), (1, torch.bfloat16)
    ]]  # fmt: skip
    assert [[tensor.numel() for tensor in bucket] for bucket in _buckets(tensors)] == [[3, 4], [5], [BUCKET], [1]]


def test_srun_says_which_process_this_is() -> None:
    environment = {
        "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456",
        "SLURM_STEP_NODELIST": "node[07-08,12],gpu3",
    }  # fmt: skip
    launch.adopt_slurm(environment)
    assert {key: environment[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")} == {
        "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "node07", "MASTER_PORT": "23456",
    }  # fmt: skip
    assert launch._first_host("alone") == "alone"
    batch_script = {"SLURM_NTASKS": "16", "SLURM_PROCID": "0"}
    launch.adopt_slurm(batch_script)
    assert "RANK" not in batch_script
