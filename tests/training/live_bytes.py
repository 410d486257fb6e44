"""Bytes of tensors that are there, counted while code runs on a CPU; and an attention that makes what flash attention makes."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SAMPLES = 3  # in a flat row: flash attention rounds each up in its backward


class Tracker(TorchDispatchMode):
    """Bytes of the storages made since it began that are still there, after each operation; the most in each moment."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.old: set[int] = set()
        self.before, self.moment, self.most = before, "forward pass", {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.old |= self._storages((args, kwargs)).keys() - self.made.keys()
        result = function(*args, **(kwargs or {}))
        for key, storage in self._storages(result).items():
            if key not in self.old:
                self.made.setdefault(key, (StorageWeakRef(storage), storage.nbytes()))
        self.most[self.moment] = max(self.most.get(self.moment, 0), self.alive())
        return result

    def alive(self) -> int:
        self.made = {key: made for key, made in self.made.items() if not made[0].expired()}
        return self.before + sum(size for _, size in self.made.values())

    @staticmethod
    def _storages(values: Any) -> dict[int, torch.UntypedStorage]:
        storages = [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
        return {storage._cdata: storage for storage in storages}


class Attention(torch.autograd.Function):
    """What variable-length flash attention makes and keeps."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out, sums = query.new_empty(query.shape), torch.empty(len(query), query.shape[1])
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        query, *_ = ctx.saved_tensors
        padded = len(query) + 128 * SAMPLES
        workspace = torch.empty(padded, *query.shape[1:]), torch.empty(padded, query.shape[1])
        made = tuple(part.new_empty(part.shape) for part in ctx.saved_tensors[:3])
        del workspace
        return made


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    return Attention.apply(query, key, value)
