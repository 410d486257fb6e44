"""The optimizer and the learning rate's course."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from course_lib.recipe import TrainingSettings

if TYPE_CHECKING:
    import torch
    from torch.optim.lr_scheduler import LRScheduler


def parameter_groups(
    trainable: Mapping[str, torch.nn.Parameter], settings: TrainingSettings, *, lr_ratio: float = 1
) -> list[dict[str, Any]]:
    """The optimizer's groups of parameters, by name; the first has the learning rate `settings.lr`.

    B learns `lr_ratio` times as fast as A (LoRA+, Hayou et al. 2024, arXiv 2402.12354), and so do DoRA's magnitudes, as in its
    authors' code. Biases, norms and magnitudes are not decayed.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = defaultdict(list)
    for name, parameter in trainable.items():
        matrix = parameter.ndim > 1 or "lora_A" in name or "lora_B" in name  # which the fused layers hold flat
        lr = settings.lr * (lr_ratio if "lora_B" in name or "lora_magnitude" in name else 1)
        groups[lr, settings.weight_decay if matrix else 0.0].append(parameter)
    ordered = sorted(groups, key=lambda group: group[0] != settings.lr)
    return [{"params": groups[lr, decay], "lr": lr, "weight_decay": decay} for lr, decay in ordered]


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter] | list[dict[str, Any]], settings: TrainingSettings
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), or bitsandbytes' with 8-bit or paged states, of parameters or `parameter_groups`."""
    import torch

    arguments = {"lr": settings.lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **arguments)
    from bitsandbytes import optim

    kinds = {
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw": optim.PagedAdamW32bit,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
    }
    return kinds[settings.optimizer](parameters, **arguments)


def make_schedule(optimizer: torch.optim.Optimizer, settings: TrainingSettings, *, total_steps: int) -> LRScheduler:
    """Linear warm-up over `warmup_ratio` of the run, then cosine or linear to zero, or constant.

    No step is taken at rate zero: the first of n warm-up steps has 1/n of `lr`, and zero is reached after the last step.
    """
    from torch.optim.lr_scheduler import LambdaLR

    warmup = round(settings.warmup_ratio * total_steps)

    def share_of_lr(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1, total_steps - warmup)  # 0 at the end of warm-up, below 1 at the last step
        return {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[
            settings.schedule
        ]

    return LambdaLR(optimizer, share_of_lr)
