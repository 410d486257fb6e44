"""Weights come out of DeepSpeed's shards as they were, whatever the stage and the ranks; what does not go together is named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import Tensors, write_zero

from course_lib.errors import InputError
from course_lib.export.zero_shards import read_zero, zero_folder


def weights(seed: int = 0) -> list[Tensors]:
    """Two groups of the optimizer; sizes that no number of ranks divides, and one below it."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [{"a": (5, 3), "b": (7,), "c": (1,), "d": (2, 3, 2)}, {"e": (4, 4), "f": (3,)}]
    return [{name: torch.randn(shape, generator=generator) for name, shape in group.items()} for group in shapes]


def read(folder: Path) -> Tensors:
    found = zero_folder(folder)
    assert found is not None
    return {name: tensor.read() for name, tensor in read_zero(found).trained.items()}


def same(found: Tensors, groups: list[Tensors]) -> bool:
    expected = {name: tensor for group in groups for name, tensor in group.items()}
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 40])
@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        (1, {}),
        (1, {"prefix": "bf16_", "trim": False, "say_stage": False}),  # the optimizer of bfloat16
        (2, {}),
        (2, {"align": 8}),
        (3, {}),
        (3, {"prefix": "bf16_"}),
    ],
)
def test_every_stage_on_any_number_of_ranks(stage: int, settings: dict[str, Any], ranks: int, tmp_path: Path) -> None:
    write_zero(tmp_path, weights(), stage=stage, ranks=ranks, **settings)
    assert same(read(tmp_path), weights())


def test_frozen_and_shared_weights(tmp_path: Path) -> None:
    frozen = {"frozen": torch.randn(5, 2), "small": torch.randn(1)}
    for stage in (2, 3):
        folder = tmp_path / str(stage)
        write_zero(
            folder, weights(), stage=stage, ranks=3, frozen=frozen, shared_params={"head": "a"}, meta={"cfg": "x"}
        )
        found = read_zero(folder)
        assert torch.equal(found.trained["head"].read(), weights()[0]["a"])
        assert found.frozen.keys() == frozen.keys()
        assert all(torch.equal(found.frozen[name].read(), frozen[name]) for name in frozen)
        assert found.saved_beside["meta"] == {"cfg": "x"}


def test_a_run_without_zero(tmp_path: Path) -> None:
    module = {"a": torch.randn(3, 2).bfloat16()}
    torch.save({"module": module, "param_shapes": None, "optimizer": {}}, tmp_path / "mp_rank_00_model_states.pt")
    assert same(read(tmp_path), [module])


def test_where_the_files_are(tmp_path: Path) -> None:
    for step in (5, 10):
        write_zero(tmp_path / f"global_step{step}", weights(step), stage=2, ranks=2)
    with pytest.raises(InputError, match=r"holds 2 checkpoints and no latest; name one, such as .*global_step5"):
        zero_folder(tmp_path)
    (tmp_path / "latest").write_text("global_step10\n")
    assert same(read(tmp_path), weights(10))
    assert same(read(tmp_path / "global_step5"), weights(5))
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(InputError, match=r"latest: names '../elsewhere', and there is no such folder beside it"):
        zero_folder(tmp_path)
    (tmp_path / "latest").unlink()
    shutil.rmtree(tmp_path / "global_step5")
    assert same(read(tmp_path), weights(10))
    assert zero_folder(tmp_path / "global_step10" / "..") is not None
    (tmp_path / "empty").mkdir()
    assert zero_folder(tmp_path / "empty") is None


def shard(folder: Path, rank: int) -> Path:
    return folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_missing_is_named(stage: int, tmp_path: Path) -> None:
    write_zero(tmp_path, weights(), stage=stage, ranks=4)
    shard(tmp_path, 0).unlink()
    refused(tmp_path, f"{shard(tmp_path, 0)}: is missing: the run had 4 ranks; copy the whole folder")
    shard(tmp_path, 2).unlink()
    refused(tmp_path, f"{shard(tmp_path, 0)}: is missing (and 1 more): the run had 4 ranks")
    for rank in (1, 3):
        shard(tmp_path, rank).unlink()
    refused(tmp_path, "has no file *_optim_states.pt")
    for file in tmp_path.glob("*_model_states.pt"):
        file.unlink()
    write_zero(tmp_path / "other", weights(), stage=stage, ranks=1)
    shutil.copy(shard(tmp_path / "other", 0), tmp_path)
    refused(tmp_path, "has no file *mp_rank_00_model_states.pt of rank 0")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shards_that_do_not_go_together(stage: int, tmp_path: Path) -> None:
    write_zero(tmp_path / "whole", weights(), stage=stage, ranks=3)
    more = [{**group, f"more{number}": torch.ones(6)} for number, group in enumerate(weights())]
    write_zero(tmp_path / "larger", more, stage=stage, ranks=3)
    write_zero(tmp_path / "wider", weights(), stage=stage, ranks=5)
    write_zero(tmp_path / "other stage", weights(), stage=3 if stage < 3 else 2, ranks=3)
    for name, said in [
        ("larger", "_1_mp_rank_00_optim_states.pt: holds"),
        ("wider", "on 5 ranks, zero_pp_rank_0_mp_rank_00_optim_states.pt of stage"),
        ("other stage", "keep the files of one checkpoint"),
    ]:
        mixed = tmp_path / f"mixed {name}"
        shutil.copytree(tmp_path / "whole", mixed)
        shutil.copy(shard(tmp_path / name, 1), mixed)
        refused(mixed, said)
    every = tmp_path / "every"
    shutil.copytree(tmp_path / "whole", every)
    for rank in range(3):
        shutil.copy(shard(tmp_path / "larger", rank), every)
    refused(every, "_optim_states.pt: holds")
    shutil.copytree(tmp_path / "whole", tmp_path / "another rank")
    shard(tmp_path / "another rank", 2).rename(shard(tmp_path / "another rank", 7))
    refused(tmp_path / "another rank", "is of rank 7, and the run had 3")
    shutil.copytree(tmp_path / "whole", tmp_path / "twice")
    shutil.copy(shard(tmp_path / "whole", 1), tmp_path / "twice" / f"bf16_{shard(tmp_path, 1).name}")
    refused(tmp_path / "twice", "are both of rank 1")
    damaged = tmp_path / "damaged"
    shutil.copytree(tmp_path / "whole", damaged)
    whole = shard(damaged, 1).read_bytes()
    shard(damaged, 1).write_bytes(whole[: len(whole) // 2])
    refused(damaged, f"{shard(damaged, 1)}: is damaged or was not copied whole")


def test_models_that_were_split_over_gpus(tmp_path: Path) -> None:
    write_zero(tmp_path, weights(), stage=2, ranks=2)
    parallel = tmp_path / "zero_pp_rank_0_mp_rank_01_optim_states.pt"
    shutil.copy(shard(tmp_path, 0), parallel)
    refused(tmp_path, "tensor parallelism")
    parallel.rename(tmp_path / "expp_rank_0_mp_rank_00_optim_states.pt")
    refused(tmp_path, "split by layers or experts")


@pytest.mark.parametrize(
    "change",
    [
        {"param_shapes": [{"a": "x"}]},
        {"param_shapes": [{"a": (3, -1)}]},
        {"param_shapes": {"a": 1}},
        {"param_shapes": 5},
        {"param_shapes": [{"a": (2, 2)}]},
        {"param_shapes": [{"a": (50, 30)}, {"b": (1,)}]},
    ],
)
@pytest.mark.parametrize("stage", [2, 3])
def test_model_files_of_another_form(change: dict[str, Any], stage: int, tmp_path: Path) -> None:
    write_zero(tmp_path, weights(), stage=stage, ranks=2, **change)
    with pytest.raises(InputError) as caught:
        read_zero(tmp_path)
    assert "\n" not in str(caught.value)


def test_other_files_of_that_name(tmp_path: Path) -> None:
    torch.save([1], tmp_path / "mp_rank_00_model_states.pt")
    refused(tmp_path, "has no param_shapes, so it is no file of DeepSpeed")


def refused(folder: Path, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_zero(folder)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
