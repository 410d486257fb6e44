"""Weights out of the shards of a DeepSpeed checkpoint, ZeRO stage 1, 2 or 3 (Rajbhandari et al. 2020, arXiv 1910.02054).

Each rank writes `zero_pp_rank_R_mp_rank_00_optim_states.pt` (in bfloat16 with `bf16_` before it) with its part of the float32 weights,
without names. Names and shapes, in the order of the parts, are the `param_shapes` of `mp_rank_00_model_states.pt`, in stage 3 of
`zero_pp_rank_R_mp_rank_00_model_states.pt`: one ordered dict for each group of the optimizer.

Stages 1 and 2: a group's weights lie end to end, after each the padding that `param_alignment_paddings` says (since DeepSpeed 0.19),
and this vector is cut into equal parts, one a rank (`single_partition_of_fp32_groups`). What fills up the last parts is cut off
before they are saved, or not.

Stage 3: every weight of n elements is cut by itself into parts of ⌈n / ranks⌉, the last filled up; a rank's parts lie end to end,
in as many tensors as there are sub-groups (`fp32_flat_groups`).

Source: deepspeed/utils/zero_to_fp32.py, runtime/engine.py and runtime/zero/stage_1_and_2.py of DeepSpeed 0.19.8 (Apache-2.0).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import accumulate
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.errors import InputError
from course_lib.export.restricted_load import Inert, LazyTensor, PickledTensor, load_restricted

if TYPE_CHECKING:
    import torch

OPTIMIZER_FILE = re.compile(r"((?:bf16_|fp16_)?)zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
LATEST = "latest"  # the file that names the folder of the newest checkpoint


@dataclass(frozen=True)
class ZeroCheckpoint:
    """What a DeepSpeed checkpoint holds, by the names of the model's parameters."""

    trained: dict[str, LazyTensor]  # float32, or 16 bits where the run was without ZeRO
    frozen: dict[str, LazyTensor]  # parameters that were saved though not trained, and buffers
    saved_beside: dict[str, Any]  # what the training program had DeepSpeed save with it, such as mmengine's meta


@dataclass(frozen=True)
class GatheredTensor:
    """A tensor in parts: views of mapped files, end to end, with filling after them."""

    shape: tuple[int, ...]
    parts: list[torch.Tensor] = field(repr=False)

    def read(self) -> torch.Tensor:
        """The tensor, copied together."""
        import torch

        return torch.cat(self.parts)[: prod(self.shape)].view(self.shape)


def zero_folder(folder: Path) -> Path | None:
    """Return the folder of DeepSpeed's files: this one, the one that the file `latest` in it names, or its only `global_step…`.

    Raises:
        InputError: `latest` names no folder beside it, or there are several `global_step…` and no `latest`.
    """
    if any(OPTIMIZER_FILE.fullmatch(path.name) or MODEL_FILE.fullmatch(path.name) for path in folder.iterdir()):
        return folder
    if (folder / LATEST).is_file():
        name = (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
        if not name or Path(name).name != name or not (folder / name).is_dir():
            raise InputError(
                f"{folder / LATEST}: names {name!r}, and there is no such folder beside it; name the folder itself"
            )
        return folder / name
    steps = sorted(path for path in folder.glob("global_step*") if path.is_dir())
    if len(steps) > 1:
        raise InputError(f"{folder}: holds {len(steps)} checkpoints and no {LATEST}; name one, such as {steps[-1]}")
    return steps[0] if steps else None


def read_zero(folder: Path) -> ZeroCheckpoint:
    """Read a folder of DeepSpeed's files; weights are read when they are asked for.

    Raises:
        InputError: a shard is missing, of another size than it must be, of another run, or damaged; or the model itself was split over
            GPUs (tensor parallelism, experts), which is not put together here.
    """
    model_files, shard_files = _files(folder)
    models = [_content(file, "param_shapes", list | None) for file in model_files]
    beside = {key: value for key, value in models[0].items() if key not in ("module", "optimizer")}
    weights = _tensors(models[0].get("module"))
    groups = models[0]["param_shapes"]
    if groups is None:  # a run without ZeRO: its weights stand in one file
        return ZeroCheckpoint(weights, {}, beside)
    if not shard_files:
        raise InputError(
            f"{folder}: has no file *_optim_states.pt, which the trained weights are in; copy the whole folder"
        )
    shards = [_content(file, "optimizer_state_dict", dict)["optimizer_state_dict"] for file in shard_files]
    stage = _check_ranks(folder, shard_files, shards)
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    shapes = [_shapes(model_files[0], group) for group in groups]
    flats = [
        _flats(file, shard.get(key), None if stage == 3 else len(shapes))
        for file, shard in zip(shard_files, shards, strict=True)
    ]
    if stage == 3:
        trained = _gather_by_weight(flats, shapes, shard_files)
    else:
        trained = _gather_by_group(flats, shapes, _paddings(shard_files[0], shards[0], shapes), shard_files)
    frozen = weights
    if stage == 3:  # where only buffers are whole in `module`
        frozen = {name: tensor for name, tensor in weights.items() if prod(tensor.shape)}
        frozen |= _gather_frozen(models, model_files)
    shared = models[0].get("shared_params")
    for name, same in shared.items() if isinstance(shared, dict) else ():
        if isinstance(same, str) and same in trained:
            trained[name] = trained[same]
    return ZeroCheckpoint(trained, {name: frozen[name] for name in frozen if name not in trained}, beside)


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files of the model's state and of the optimizer's, in the order of their ranks."""
    models: dict[int, Path] = {}
    shards: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        shard, model = OPTIMIZER_FILE.fullmatch(path.name), MODEL_FILE.fullmatch(path.name)
        if not shard and not model:
            if path.name.startswith(("expp_rank_", "layer_")):
                raise InputError(f"{path}: is of a model split by layers or experts, which is not put together here")
            continue
        rank, parallel = int((shard[2] if shard else model[1]) or 0), int(shard[3] if shard else model[2])
        if parallel:
            raise InputError(
                f"{path}: is of a model split over GPUs (tensor parallelism), which is not put together here; use DeepSpeed's own tools"
            )
        kind = shards if shard else models
        if rank in kind:
            raise InputError(f"{path}: and {kind[rank].name} are both of rank {rank}; keep the files of one checkpoint")
        kind[rank] = path
    if 0 not in models:
        raise InputError(f"{folder}: has no file *mp_rank_00_model_states.pt of rank 0; copy the whole folder")
    return [models[rank] for rank in sorted(models)], [shards[rank] for rank in sorted(shards)]


def _content(file: Path, key: str, kind: type) -> dict[str, Any]:
    content = load_restricted(file)
    if not isinstance(content, dict) or not isinstance(content.get(key, ...), kind):
        raise InputError(f"{file}: has no {key}, so it is no file of DeepSpeed; name another folder")
    return content


def _check_ranks(folder: Path, files: list[Path], shards: list[dict[str, Any]]) -> int:
    """Return the stage; every rank must be there, and say the same of stage and ranks."""
    said = [(_stage(file, shard), _ranks(file, shard)) for file, shard in zip(files, shards, strict=True)]
    stage, ranks = said[0]
    numbers = [int(OPTIMIZER_FILE.fullmatch(file.name)[2]) for file in files]
    for file, (other_stage, other_ranks), number in zip(files, said, numbers, strict=True):
        if (other_stage, other_ranks) != (stage, ranks):
            raise InputError(
                f"{file}: is of a run with ZeRO stage {other_stage} on {other_ranks} ranks, {files[0].name} of stage {stage} on {ranks}; "
                "keep the files of one checkpoint"
            )
        if number >= ranks:
            raise InputError(f"{file}: is of rank {number}, and the run had {ranks}; keep the files of one checkpoint")
    if missing := [rank for rank in range(ranks) if rank not in numbers]:
        name = files[0].name.replace(f"zero_pp_rank_{numbers[0]}_", f"zero_pp_rank_{missing[0]}_")
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"{folder / name}: is missing{more}: the run had {ranks} ranks; copy the whole folder")
    return stage


def _stage(file: Path, shard: dict[str, Any]) -> int:
    stage = shard.get("zero_stage", 1)  # the optimizer of bfloat16 says none, and has stage 1's form
    if isinstance(stage, Inert):  # an enum
        stage = stage.arguments[0] if len(stage.arguments) == 1 else None
    if stage not in (1, 2, 3):
        raise InputError(f"{file}: is of ZeRO stage {stage}, and stages 1, 2 and 3 are known here")
    return stage


def _ranks(file: Path, shard: dict[str, Any]) -> int:
    count = shard.get("partition_count")
    counts = count if isinstance(count, list) else [count]  # in stages 1 and 2 one a group
    if not counts or not all(type(one) is int and one > 0 for one in counts) or len({*counts}) > 1:
        raise InputError(f"{file}: says {count!r} of its number of ranks; it is damaged, or of a model with experts")
    return counts[0]


def _gather_by_group(
    flats: list[list[torch.Tensor]],
    groups: list[dict[str, tuple[int, ...]]],
    paddings: list[list[int]],
    files: list[Path],
) -> dict[str, LazyTensor]:
    """Stages 1 and 2: a group's vector goes over all ranks."""
    gathered: dict[str, LazyTensor] = {}
    for number, shapes in enumerate(groups):
        parts = [flat[number] for flat in flats]
        sizes = [prod(shape) + padding for shape, padding in zip(shapes.values(), paddings[number], strict=True)]
        starts = [0, *accumulate(sizes)]
        _check_parts(parts, starts[-1], number, files)
        for (name, shape), start in zip(shapes.items(), starts, strict=False):
            gathered[name] = GatheredTensor(shape, _span(parts, start, prod(shape)))
    return gathered


def _check_parts(parts: list[torch.Tensor], size: int, group: int, files: list[Path]) -> None:
    """Every rank has as many as the first, but for what is cut off behind the `size` of all; filling makes it a multiple of two a rank."""
    again = "it is damaged, or of another run; copy the whole folder"
    whole, aligned = len(parts[0]), 2 * len(parts)
    for rank, part in enumerate(parts):
        left = min(whole, max(0, size - rank * whole))
        if len(part) not in (left, whole):
            raise InputError(
                f"{files[rank]}: holds {len(part)} weights of group {group}, and {left} must be there: {again}"
            )
    found = sum(map(len, parts))
    if ceil(found / aligned) != ceil(size / aligned):
        raise InputError(
            f"{files[0]}: holds {whole} weights of group {group}, but {size} are on {len(parts)} ranks: {again}"
        )


def _gather_by_weight(
    flats: list[list[torch.Tensor]], groups: list[dict[str, tuple[int, ...]]], files: list[Path]
) -> dict[str, LazyTensor]:
    """Stage 3: each weight goes over all ranks."""
    ranks = len(flats)
    expected = sum(ceil(prod(shape) / ranks) for shapes in groups for shape in shapes.values())
    for file, flat in zip(files, flats, strict=True):
        if (found := sum(map(len, flat))) != expected:
            raise InputError(
                f"{file}: holds {found} weights, and {expected} must be there: it is damaged, or of another run; copy the whole folder"
            )
    gathered: dict[str, LazyTensor] = {}
    start = 0
    for shapes in groups:
        for name, shape in shapes.items():
            size = ceil(prod(shape) / ranks)
            gathered[name] = GatheredTensor(shape, [part for flat in flats for part in _span(flat, start, size)])
            start += size
    return gathered


def _gather_frozen(models: list[dict[str, Any]], files: list[Path]) -> dict[str, LazyTensor]:
    """Stage 3's frozen parameters, each cut like a trained one, where they were saved."""
    gathered: dict[str, LazyTensor] = {}
    for name, shape in _shapes(files[0], models[0].get("frozen_param_shapes") or {}).items():
        parts = []
        for file, model in zip(files, models, strict=True):
            fragments = model.get("frozen_param_fragments") or {}
            parts.append(_flat(file, fragments.get(name)))
        if sum(map(len, parts)) < prod(shape):
            raise InputError(
                f"{files[0].parent}: holds only a part of {name} in its *_model_states.pt; copy the whole folder"
            )
        gathered[name] = GatheredTensor(shape, parts)
    return gathered


def _span(parts: list[torch.Tensor], start: int, count: int) -> list[torch.Tensor]:
    """`count` elements from `start` on, of tensors of one dimension that lie end to end."""
    found = []
    for part in parts:
        if start < len(part) and count > 0:
            found.append(part[start : start + count])
            count -= len(found[-1])
            start = 0
        else:
            start -= len(part)
    return found or [parts[0][:0]]


def _paddings(file: Path, shard: dict[str, Any], groups: list[dict[str, tuple[int, ...]]]) -> list[list[int]]:
    paddings = shard.get("param_alignment_paddings")
    if paddings is None:
        return [[0] * len(group) for group in groups]
    if not isinstance(paddings, list) or [[type(one) for one in own] for own in paddings] != [
        [int] * len(group) for group in groups
    ]:
        raise InputError(f"{file}: its param_alignment_paddings are not those of its weights; it is damaged")
    return paddings


def _flats(file: Path, values: Any, count: int | None) -> list[torch.Tensor]:
    if not isinstance(values, list) or (count is not None and len(values) != count):
        raise InputError(
            f"{file}: has no weights of {count or 'its'} groups; it is damaged, or of a DeepSpeed that is not known here"
        )
    return [_flat(file, value) for value in values]


def _flat(file: Path, value: Any) -> torch.Tensor:
    if not isinstance(value, PickledTensor) or len(value.shape) != 1:
        raise InputError(f"{file}: holds something else where a rank's part of the weights must be; it is damaged")
    return value.read()


def _shapes(file: Path, group: Any) -> dict[str, tuple[int, ...]]:
    if not isinstance(group, dict) or not all(
        isinstance(name, str) and isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
        for name, shape in group.items()
    ):
        raise InputError(f"{file}: its param_shapes are no names with shapes; it is damaged")
    return dict(group)


def _tensors(values: Any) -> dict[str, LazyTensor]:
    items = values.items() if isinstance(values, dict) else ()
    return {name: value for name, value in items if isinstance(name, str) and isinstance(value, PickledTensor)}
