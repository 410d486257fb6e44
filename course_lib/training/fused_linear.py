"""Linear layers that read the same input, frozen weights and adapters together, with a backward pass written by hand.

y = W x + b + s · B A x. The frozen weights of the group are one product, and so are the A of all adapters; each B x is added
in place. Backward needs no gradient of W, and gets those of A and B from thin products that never form one of W's size:

    t = s · Bᵀ dy     dx = Wᵀ dy + Aᵀ t     dA = t xᵀ     dB = s · dy (A x)ᵀ
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import nn

from course_lib.training.flat import FlatParameter
from course_lib.training.frozen import FrozenLinears


@dataclass
class _Adapter:
    """One layer's adapter: where it stands in the group's outputs and ranks, and its matrices in the compute type."""

    outputs: slice
    ranks: slice
    a: torch.Tensor  # (rank, inputs)
    grad_a: torch.Tensor
    b: torch.Tensor  # (outputs, rank)
    b_transposed: torch.Tensor  # a view
    grad_b: torch.Tensor
    scaling: float
    dropout: float


@dataclass
class Saved:
    """What backward needs beside the input: A x scaled, shape (rows, ranks), and the seed of each adapter's dropout."""

    ax: torch.Tensor | None
    seeds: list[int]


class FusedLinears:
    """A group of peft linear layers, such as q, k and v. Gradients are added to the flat parameters', not returned."""

    def __init__(self, layers: Sequence[nn.Module], flat_a: FlatParameter, flat_b: FlatParameter) -> None:
        bases = [getattr(layer, "base_layer", layer) for layer in layers]
        self.frozen = FrozenLinears(bases, dtype=flat_a.compute.dtype)
        self.outputs = [slice(*pair) for pair in pairwise(accumulate(self.frozen.out_features, initial=0))]
        adapted = [(layer, out) for layer, out in zip(layers, self.outputs, strict=True) if hasattr(layer, "lora_A")]
        self.a: torch.Tensor | None = None
        self.adapters: list[_Adapter] = []
        if not adapted:
            return
        self.a, self.grad_a = flat_a.views([_matrix(layer, "lora_A") for layer, _ in adapted])
        start = 0
        for layer, outputs in adapted:
            b, grad_b = flat_b.views([_matrix(layer, "lora_B")])
            ranks = slice(start, start + b.shape[1])
            start = ranks.stop
            dropout = getattr(layer.lora_dropout["default"], "p", 0.0)
            self.adapters.append(
                _Adapter(
                    outputs,
                    ranks,
                    self.a[ranks],
                    self.grad_a[ranks],
                    b,
                    b.t(),
                    grad_b,
                    layer.scaling["default"],
                    dropout,
                )
            )
        scalings = {adapter.scaling for adapter in self.adapters}
        # one product for all A, and one scale, where no adapter drops its own share of the input
        self.joint = len(scalings) == 1 and not any(adapter.dropout for adapter in self.adapters)

    def forward(self, x: torch.Tensor, *, seeds: list[int] | None = None) -> tuple[torch.Tensor, Saved]:
        """Shape (rows, inputs) to (rows, sum of outputs). With the seeds of an earlier call, the same inputs are dropped."""
        weight = self.frozen.weight().t()
        y = x @ weight if self.frozen.bias is None else torch.addmm(self.frozen.bias, x, weight)
        saved = self.project(x, seeds=seeds)
        for adapter in self.adapters:
            y[:, adapter.outputs].addmm_(saved.ax[:, adapter.ranks], adapter.b_transposed)
        return y, saved

    def project(self, x: torch.Tensor, *, seeds: list[int] | None = None) -> Saved:
        """s · A x of every adapter."""
        if self.a is None:
            return Saved(None, [])
        if self.joint:
            return Saved((x @ self.a.t()).mul_(self.adapters[0].scaling), [])
        seeds = torch.randint(2**31, (len(self.adapters),)).tolist() if seeds is None else seeds
        ax = x.new_empty(len(x), len(self.a))
        for adapter, seed in zip(self.adapters, seeds, strict=True):
            ax[:, adapter.ranks] = (drop(x, adapter.dropout, seed) @ adapter.a.t()).mul_(adapter.scaling)
        return Saved(ax, seeds)

    def backward(self, grad: torch.Tensor, saved: Saved, x: torch.Tensor) -> torch.Tensor:
        """Add the adapters' gradients; return that of the input, shape (rows, inputs).

        Args:
            grad: shape (rows, sum of outputs).
            x: the input of `forward`.
        """
        by_x, t = self.backward_input(grad, saved)
        self.backward_adapters(grad, saved, x, t)
        return by_x

    def backward_input(self, grad: torch.Tensor, saved: Saved) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The input's gradient, and t for `backward_adapters`: for where the input itself is only made in between."""
        by_x = grad @ self.frozen.weight()
        t = self.t(grad)
        if t is not None and self.joint:
            by_x.addmm_(t, self.a)
        elif t is not None:
            for adapter, seed in zip(self.adapters, saved.seeds, strict=True):
                by_x += drop(t[:, adapter.ranks] @ adapter.a, adapter.dropout, seed)
        return by_x, t

    def backward_adapters(self, grad: torch.Tensor, saved: Saved, x: torch.Tensor, t: torch.Tensor | None) -> None:
        """Add the gradients of A and B to what is there."""
        if t is None or saved.ax is None:
            return
        if self.joint:
            _add_product(self.grad_a, t.t(), x)
        for number, adapter in enumerate(self.adapters):
            _add_product(adapter.grad_b, grad[:, adapter.outputs].t(), saved.ax[:, adapter.ranks])
            if not self.joint:
                dropped = drop(x, adapter.dropout, saved.seeds[number])
                _add_product(adapter.grad_a, t[:, adapter.ranks].t(), dropped)

    def t(self, grad: torch.Tensor) -> torch.Tensor | None:
        """s · Bᵀ dy of every adapter, shape (rows, ranks)."""
        if self.a is None:
            return None
        t = grad.new_empty(len(grad), len(self.a))
        for adapter in self.adapters:
            torch.mm(grad[:, adapter.outputs], adapter.b, out=t[:, adapter.ranks])
            if not self.joint:
                t[:, adapter.ranks].mul_(adapter.scaling)
        return t.mul_(self.adapters[0].scaling) if self.joint else t


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right; the sum is kept in the total's type, which may be wider."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def drop(x: torch.Tensor, probability: float, seed: int) -> torch.Tensor:
    """Dropout whose mask follows from a seed alone, so that backward makes it again instead of keeping it."""
    if not probability:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    kept = torch.empty_like(x).bernoulli_(1 - probability, generator=generator)
    return x * kept.div_(1 - probability)


def _matrix(layer: nn.Module, name: str) -> nn.Parameter:
    return getattr(layer, name)["default"].weight
