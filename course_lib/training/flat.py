"""Many small trainable tensors as slices of one large one.

An adapter on 32 layers is 448 tensors, and an optimizer step as many launches. End to end they are one tensor, clipped and
stepped as one; the model's own parameters become slices of it, so saving and loading see nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


class FlatParameter:
    """Trainable tensors laid end to end, with what the fused layers compute with and add gradients to.

    Attributes:
        master: what the optimizer steps; `master.grad` holds the gradient of the whole step. Each given parameter's data
            and grad are slices of the two.
        compute: the same values in the type the model computes in; `refresh()` brings them up to date after a step.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, compute_dtype: torch.dtype) -> None:
        first = parameters[0]
        self.master = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
        self.master.grad = torch.zeros_like(self.master)
        self.shadowed = first.dtype != compute_dtype
        self.compute = self.master.detach().to(compute_dtype)  # the very tensor where types are alike
        self._slices: dict[int, slice] = {}
        start = 0
        for parameter in parameters:
            part = self._slices[id(parameter)] = slice(start, start + parameter.numel())
            parameter.data = self.master.detach()[part].view(parameter.shape)
            parameter.grad = self.master.grad[part].view(parameter.shape)
            start = part.stop

    def refresh(self) -> None:
        """Bring `compute` up to date."""
        if self.shadowed:
            self.compute.copy_(self.master.detach())

    def views(self, parameters: Sequence[nn.Parameter]) -> tuple[torch.Tensor, torch.Tensor]:
        """Slices of `compute` and of `master.grad` for parameters that stand next to one another and have equal width.

        Returns:
            Both of shape (sum of their rows, width).
        """
        parts = [self._slices[id(parameter)] for parameter in parameters]
        assert all(one.stop == other.start for one, other in pairwise(parts))
        span, width = slice(parts[0].start, parts[-1].stop), parameters[0].shape[1]
        assert self.master.grad is not None
        return self.compute[span].view(-1, width), self.master.grad[span].view(-1, width)
