"""Checkpoints as DeepSpeed and mmengine write them, made by hand of known tensors, with objects of classes that are not installed."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

XTUNER_CONFIG = """
SYSTEM = ''
model = dict(
    llm=dict(
        pretrained_model_name_or_path='internlm/internlm-chat-7b',
        quantization_config=dict(
            bnb_4bit_compute_dtype='torch.float16',
            bnb_4bit_quant_type='nf4',
            bnb_4bit_use_double_quant=True,
            llm_int8_threshold=6.0,
            load_in_4bit=True,
            load_in_8bit=False,
            type='transformers.BitsAndBytesConfig'),
        torch_dtype='torch.float16',
        trust_remote_code=True,
        type='transformers.AutoModelForCausalLM.from_pretrained'),
    lora=dict(
        bias='none',
        lora_alpha=16,
        lora_dropout=0.1,
        r=4,
        task_type='CAUSAL_LM',
        type='peft.LoraConfig'),
    type='xtuner.model.SupervisedFinetune')
prompt_template = 'xtuner.utils.PROMPT_TEMPLATE.internlm_chat'
"""

Tensors = dict[str, torch.Tensor]


@contextmanager
def foreign_class(module: str, name: str, base: type = object) -> Iterator[type]:
    """A class that is there while something is saved, and cannot be imported when it is read."""
    parts = module.split(".")
    names = [".".join(parts[: number + 1]) for number in range(len(parts))]
    made = type(name, (base,), {"__module__": module})
    added = [one for one in names if one not in sys.modules]
    for one in added:
        sys.modules[one] = ModuleType(one)
    setattr(sys.modules[module], name, made)
    try:
        yield made
    finally:
        for one in added:
            del sys.modules[one]


def write_xtuner(path: Path, state: Tensors, *, config: Any = XTUNER_CONFIG, **more: Any) -> Path:
    """An epoch_N.pth of XTuner 0.1.9: mmengine's runner adds logs, optimizer and config."""
    with foreign_class("mmengine.logging.history_buffer", "HistoryBuffer") as buffer:
        log = buffer()
        log._log_history, log.statistics = torch.ones(3).double().numpy(), {"mean": getattr}
        content = {
            "meta": {"epoch": 1, "iter": 4, "cfg": config, "mmengine_version": "0.10.7"},
            "state_dict": OrderedDict(state),
            "message_hub": {"log_scalars": {"train/loss": log}, "runtime_info": {"eta": torch.ones(1).numpy()[0]}},
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]},
            **more,
        }
        torch.save(content, path)
    return path


def write_zero(
    folder: Path,
    groups: list[Tensors],
    *,
    stage: int,
    ranks: int,
    prefix: str = "",
    frozen: Tensors | None = None,
    align: int = 1,
    trim: bool = True,
    say_stage: bool = True,
    **beside: Any,
) -> Path:
    """DeepSpeed's files. `align` pads behind each weight in stages 1 and 2; without `trim` the last parts keep their filling."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = [OrderedDict((name, tensor.shape) for name, tensor in group.items()) for group in groups]
    module = {name: tensor.half() for group in groups for name, tensor in group.items()} | (frozen or {})
    with (
        foreign_class("deepspeed.runtime.zero.config", "ZeroStageEnum", int) as enum,
        foreign_class("deepspeed.runtime.fp16.loss_scaler", "LossScaler") as scaler,
    ):
        enum.__reduce_ex__ = lambda self, _: (enum, (int(self),))
        for rank in range(ranks):
            state: dict[str, Any] = {"zero_stage": enum(stage), "loss_scaler": scaler(), "partition_count": ranks}
            if not say_stage:
                del state["zero_stage"]
            if stage == 3:
                parts = [_part(tensor, rank, ranks) for group in groups for tensor in group.values()]
                half = len(parts) // 2  # two sub-groups
                state["fp32_flat_groups"] = [torch.cat(some) for some in (parts[:half], parts[half:]) if some]
            else:
                paddings = [[-tensor.numel() % align for tensor in group.values()] for group in groups]
                flats = [_flat(group, own) for group, own in zip(groups, paddings, strict=True)]
                state["single_partition_of_fp32_groups"] = [_slice(flat, rank, ranks, trim=trim) for flat in flats]
                state["partition_count"] = [ranks] * len(groups)
                state |= {"param_alignment_paddings": paddings} if align > 1 else {}
            shard = {"optimizer_state_dict": state, "ds_version": "0.19.8"}
            torch.save(shard, folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
            if rank and stage < 3:
                continue
            kept = {name: torch.empty(0) for name in module} if stage == 3 else module
            model = {
                "module": OrderedDict(kept),
                "buffer_names": [],
                "param_shapes": shapes,
                "shared_params": {},
                **beside,
            }
            if stage == 3 and frozen:
                model["frozen_param_shapes"] = {name: tensor.shape for name, tensor in frozen.items()}
                model["frozen_param_fragments"] = {name: _part(tensor, rank, ranks) for name, tensor in frozen.items()}
            own = f"zero_pp_rank_{rank}_" if stage == 3 else ""
            torch.save(model, folder / f"{own}mp_rank_00_model_states.pt")
    return folder


def _part(tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """Stage 3: a rank's part of one weight."""
    size = ceil(tensor.numel() / ranks)
    filled = torch.cat([tensor.flatten().float(), torch.full((size * ranks - tensor.numel(),), float("nan"))])
    part = filled[rank * size : (rank + 1) * size].clone()
    part.ds_id = rank  # DeepSpeed's tensors have attributes, which change how they are pickled
    return part


def _flat(group: Tensors, paddings: list[int]) -> torch.Tensor:
    filling = [torch.full((padding,), float("nan")) for padding in paddings]
    pieces = zip((tensor.flatten().float() for tensor in group.values()), filling, strict=True)
    return torch.cat([one for piece in pieces for one in piece])


def _slice(flat: torch.Tensor, rank: int, ranks: int, *, trim: bool) -> torch.Tensor:
    """Stages 1 and 2: a rank's part of a group, whose end is filled up to a multiple of two a rank."""
    size = 2 * ceil(len(flat) / (2 * ranks))
    part = flat[rank * size : (rank + 1) * size].clone()
    return part if trim else torch.cat([part, torch.full((size - len(part),), float("nan"))])
