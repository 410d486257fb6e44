"""Training with parts of the model in host memory, through the loop. Without a GPU the copies are made at once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from course_lib.errors import InputError
from course_lib.training.listeners import read_metrics
from course_lib.training.loop import train

ALL = ["embedding", "head", "checkpoints", "layers"]


def losses(work_dir: Path) -> list[float]:
    return [event["loss"] for event in read_metrics(work_dir) if event["event"] in ("StepDone", "HeldOutLoss")]


@pytest.mark.parametrize("dtype", ["float32", "nf4"])
def test_the_same_run_with_everything_in_host_memory(make: Any, tmp_path: Path, dtype: str) -> None:
    for offload in ([], ALL):
        recipe = make(
            model={"dtype": dtype, "double_quant": False},  # blocks of blocks are larger than the tiny matrices
            training={"gradient_checkpointing": True, "offload": offload, "checkpoint_every": 3},
            data={"held_out": 2},
            evaluation={"questions": ["hi"], "max_new_tokens": 4},
        )
        train(recipe, work_dir=tmp_path / str(len(offload)))
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "0"), rel=1e-5)
    shutil.rmtree(tmp_path / "4" / "checkpoint-000006")
    before = losses(tmp_path / "4")
    train(recipe, work_dir=tmp_path / "4", resume=True)
    assert losses(tmp_path / "4") == before


def test_adapters_in_bfloat16_learn_as_those_in_float32(make: Any, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        train(make(lora={"dtype": dtype}), work_dir=tmp_path / dtype)
    assert losses(tmp_path / "bfloat16") == pytest.approx(losses(tmp_path / "float32"), rel=0.01)
    assert losses(tmp_path / "bfloat16") != losses(tmp_path / "float32")


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"lora": None, "training": {"offload": ["head"]}}, "without lora nothing is frozen"),
        ({"model": {"dtype": "int8"}, "training": {"offload": ["layers"]}}, "set model.dtype to nf4"),
        ({"training": {"offload": ["checkpoints"]}}, "gradient_checkpointing is false"),
        ({"training": {"offload": ["heads"]}}, "heads"),
    ],
)
def test_what_cannot_be_offloaded_is_told(make: Any, sections: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make(**sections)


def test_offloading_needs_the_fused_layers(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("course_lib.training.run.why_not_fused", lambda _: "they are square")
    with pytest.raises(InputError, match="they are square"):
        train(make(training={"offload": ["head"]}), work_dir=tmp_path / "run")
