"""The optimizer and the learning rate's course."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from course_lib.recipe import TrainingSettings

if TYPE_CHECKING:
    import torch
    from torch.optim.lr_scheduler import LRScheduler


def make_optimizer(parameters: Iterable[torch.nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), or bitsandbytes' with 8-bit or paged states."""
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
