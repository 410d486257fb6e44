"""Linear layers that read the same input, frozen weights and adapters together, with a backward pass written by hand.

y = W x + b + s · B A x. The frozen weights of the group are one product, and so are the A of all adapters. Backward needs no
gradient of W, and gets those of A and B from thin products that never form one of W's size:

    t = s · Bᵀ dy     dx = Wᵀ dy + Aᵀ t     dA = t xᵀ     dB = s · dy (A x)ᵀ

To add B (A x) to y, or Aᵀ t to dx, costs a pass over y or dx. Where the longer of the two is y, B stands beside W and s · A x
beside x, so that [W B] [x; s A x] is one product; where it is dx, A stands below W and t beside dy, and [dy; t] [W; A] is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import nn

from course_lib.training.flat import FlatParameter
from course_lib.training.frozen import FrozenLinears
from course_lib.training.fused_sizes import ALIGNMENT, aligned
from course_lib.training.kernels import put_beside
from course_lib.training.parts import part, part_of


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

    def __init__(
        self,
        layers: Sequence[nn.Module],
        flat_a: FlatParameter,
        flat_b: FlatParameter,
        *,
        joined: Literal["forward", "backward"],
    ) -> None:
        """`joined` is the pass in which the adapters are part of the product with W: the one with more to add to."""
        bases = [getattr(layer, "base_layer", layer) for layer in layers]
        outputs = [slice(*pair) for pair in pairwise(accumulate((base.out_features for base in bases), initial=0))]
        adapted = [(layer, out) for layer, out in zip(layers, outputs, strict=True) if hasattr(layer, "lora_A")]
        self.outputs = outputs
        self.a: torch.Tensor | None = None
        self.adapters: list[_Adapter] = []
        if adapted:
            self.a, self.grad_a = flat_a.views([_matrix(layer, "lora_A") for layer, _ in adapted])
        start = 0
        for layer, out in adapted:
            b, grad_b = flat_b.views([_matrix(layer, "lora_B")])
            ranks = slice(start, start + b.shape[1])
            start = ranks.stop
            dropout = getattr(layer.lora_dropout["default"], "p", 0.0)
            a, grad_a = self.a[ranks], self.grad_a[ranks]
            scaling = layer.scaling["default"]
            self.adapters.append(_Adapter(out, ranks, a, grad_a, b, b.t(), grad_b, scaling, dropout))
        # one product for all A, and one scale, where no adapter drops its own share of the input
        alike = len({adapter.scaling for adapter in self.adapters}) == 1
        self.joint = alike and not any(adapter.dropout for adapter in self.adapters)
        one_rank = len(adapted) == len(layers) and len({adapter.b.shape[1] for adapter in self.adapters}) == 1
        self.joined = joined if self.joint and one_rank and bases[0].in_features % ALIGNMENT == 0 else None
        if self.joined == "forward":
            self.b, _ = flat_b.views([_matrix(layer, "lora_B") for layer, _ in adapted])
            sizes = torch.tensor([base.out_features for base in bases])
            blocks = torch.arange(len(bases), dtype=torch.int32)
            self.owner = blocks.repeat_interleave(sizes).to(self.b.device)
        self.frozen = FrozenLinears(
            bases,
            dtype=flat_a.compute.dtype,
            device=flat_a.compute.device,
            more_rows=start if self.joined == "backward" else 0,
            more_columns=start if self.joined == "forward" else 0,
        )
        self._written = False  # the adapters beside or below a lasting W

    def after_step(self) -> None:
        """The adapters have changed."""
        self._written = False

    def new_input(self, like: torch.Tensor) -> torch.Tensor:
        """A buffer for `forward`'s input, with room beside it for A x; its first columns are shaped as `like`."""
        return _with_room(like, self.frozen.more_columns)

    def new_output_grad(self, like: torch.Tensor) -> torch.Tensor:
        """A buffer for `backward`'s gradient, with room beside it for t; its first columns are shaped as `like`."""
        return _with_room(like, self.frozen.more_rows)

    @part_of("weights")
    def forward(self, x: torch.Tensor, *, seeds: list[int] | None = None) -> tuple[torch.Tensor, Saved]:
        """Shape (rows, inputs), or what `new_input` gave, to (rows, sum of outputs).

        With the seeds of an earlier call, the same inputs are dropped.
        """
        bias, inputs = self.frozen.bias, x[:, : self.frozen.columns]
        saved = self.project(inputs, seeds=seeds)
        if joined := x.shape[1] > self.frozen.columns:
            x[:, self.frozen.columns :] = saved.ax
        weight = self._whole() if joined else self.frozen.weight()
        y = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
        with part("adapters"):
            for adapter in self.adapters if not joined else []:
                y[:, adapter.outputs].addmm_(saved.ax[:, adapter.ranks], adapter.b_transposed)
        return y, saved

    @part_of("adapters")
    def project(self, x: torch.Tensor, *, seeds: list[int] | None = None) -> Saved:
        """s · A x of every adapter."""
        if self.a is None:
            return Saved(None, [])
        ax = x.new_empty(len(x), len(self.a))
        if self.joint:
            return Saved(_scaled_product(x, self.a.t(), self.adapters[0].scaling, out=ax), [])
        seeds = torch.randint(2**31, (len(self.adapters),)).tolist() if seeds is None else seeds
        for adapter, seed in zip(self.adapters, seeds, strict=True):
            dropped = drop(x, adapter.dropout, seed)
            _scaled_product(dropped, adapter.a.t(), adapter.scaling, out=ax[:, adapter.ranks])
        return Saved(ax, seeds)

    def backward(self, grad: torch.Tensor, saved: Saved, x: torch.Tensor) -> torch.Tensor:
        """Add the adapters' gradients; return that of the input, shape (rows, inputs).

        Args:
            grad: shape (rows, sum of outputs), or what `new_output_grad` gave.
            x: the input of `forward`.
        """
        by_x, t = self.backward_input(grad, saved)
        self.backward_adapters(grad, saved, x, t)
        return by_x

    @part_of("weights")
    def backward_input(self, grad: torch.Tensor, saved: Saved) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The input's gradient, and t for `backward_adapters`: for where the input itself is only made in between."""
        t = self.t(grad)
        if t is not None and grad.shape[1] > self.frozen.rows:
            grad[:, self.frozen.rows :] = t
            return grad @ self._whole(), t
        by_x = grad @ self.frozen.weight()
        with part("adapters"):
            if t is not None and self.joint:
                by_x.addmm_(t, self.a)
            elif t is not None:
                for adapter, seed in zip(self.adapters, saved.seeds, strict=True):
                    by_x += drop(t[:, adapter.ranks] @ adapter.a, adapter.dropout, seed)
        return by_x, t

    @part_of("adapters")
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

    @part_of("adapters")
    def t(self, grad: torch.Tensor) -> torch.Tensor | None:
        """s · Bᵀ dy of every adapter, shape (rows, ranks)."""
        if self.a is None:
            return None
        t = grad.new_empty(len(grad), len(self.a))
        for adapter in self.adapters:
            _scaled_product(grad[:, adapter.outputs], adapter.b, adapter.scaling, out=t[:, adapter.ranks])
        return t

    @part_of("adapters")
    def _whole(self) -> torch.Tensor:
        """[W B] or [W; A]; each B stands in the rows of its outputs and the columns of its ranks, among zeros."""
        whole = self.frozen.whole()
        if self._written and self.frozen.lasting:
            return whole
        if self.joined == "backward":
            whole[self.frozen.rows :] = self.a
        else:
            put_beside(self.b, self.owner, whole[:, self.frozen.columns :])
        self._written = True
        return whole


def _with_room(like: torch.Tensor, more: int) -> torch.Tensor:
    return like.new_empty(len(like), like.shape[1] + aligned(more))[:, : like.shape[1] + more]


def _scaled_product(left: torch.Tensor, right: torch.Tensor, scale: float, *, out: torch.Tensor) -> torch.Tensor:
    """out = scale · left @ right in one launch: with beta 0 what stood in `out` is not read."""
    return torch.addmm(out, left, right, beta=0, alpha=scale, out=out)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right; the sum is kept in the total's type, which may be wider."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
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
