"""A frozen model spread over several GPUs: each keeps its part of every layer, and gets the others' parts while a layer is computed.

This is what fully sharded data parallel training (Zhao et al. 2023) does for weights that are trained; frozen ones have no
gradients to send back, so bytes are all that travels, and 4-bit weights are as good as any.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from course_lib.training.distributed import process_count, process_index
from course_lib.training.host_memory import TwoPlaces


class ShardedPlaces(TwoPlaces):
    """Each process keeps an equal part of the bytes of every number; all of them fetch the same numbers in the same order."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.part = -(-size // process_count())
        super().__init__(device, self.part * process_count())
        self.work: list[Any] = [None, None]

    def keep(self, number: int, source: torch.Tensor) -> None:
        """Take this process's part of bytes that will only ever be fetched."""
        own = slice(process_index() * self.part, (process_index() + 1) * self.part)
        self.host[number] = source[own].to(self.places[0].device, copy=True)

    def _begin(self, number: int, place: int) -> None:
        # NCCL begins after all that was launched before, so what used the place has read it
        self.work[place] = dist.all_gather_into_tensor(self.places[place], self.host[number], async_op=True)

    def _wait(self, place: int) -> None:
        if self.work[place] is not None:
            self.work[place].wait()
            self.work[place] = None
