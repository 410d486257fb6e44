"""A decoder layer of Llama and its kin with LoRA adapters, forward and backward written by hand.

Plain peft keeps some forty tensors a layer for backward and launches each adapter's steps one by one. Here a layer keeps
what cannot be made again cheaply, or with gradient checkpointing its input alone; norms and the SwiGLU are made again in the
pass that needs them, the products of layers that share an input are one, and nothing that only frozen weights would need is
computed: in the second forward pass of checkpointing, the last product of the layer is left out.

    x → norm → q, k, v → rotate → attention → o → + x → norm → gate, up → SwiGLU → down → + → y
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from course_lib.training.attention import attend
from course_lib.training.flat import FlatParameter
from course_lib.training.fused_linear import FusedLinears, Saved
from course_lib.training.fused_sizes import GROUPS
from course_lib.training.kernels import add_rms_norm, rms_norm_backward, rotate, swiglu, swiglu_backward_
from course_lib.training.parts import part


@dataclass(frozen=True)
class Positions:
    """What the layers share in one pass: the angles of the positions, and where one example ends and the next begins."""

    cos: torch.Tensor  # (T, head_dim)
    sin: torch.Tensor
    edges: dict[str, Any]  # attention.attend's arguments


@dataclass
class Kept:
    """What backward needs of a layer: shapes in comments, T tokens."""

    x: torch.Tensor  # (T, width)
    rstd: torch.Tensor  # (T,)
    heads: torch.Tensor | None  # (T, q + k + v) before the head norms, where there are any
    head_rstds: list[torch.Tensor]
    attention: tuple[torch.Tensor, list[torch.Tensor]]  # output with its graph, and the q, k, v it came from
    middle: torch.Tensor  # (T, width): x + attention
    middle_rstd: torch.Tensor
    gate_up: torch.Tensor  # (T, 2 · intermediate)
    linears: list[Saved]


class FusedLayer:
    """One decoder layer. What it reads and writes is a sum that is not yet made: `x`, and `delta` to be added to it."""

    def __init__(self, layer: nn.Module, flat_a: FlatParameter, flat_b: FlatParameter) -> None:
        self.groups = [
            FusedLinears([getattr(getattr(layer, part), name) for name in names], flat_a, flat_b, joined=joined)
            for part, names, joined in GROUPS
        ]
        self.qkv, self.o, self.gate_up, self.down = self.groups
        self.head_dim, self.scaling = layer.self_attn.head_dim, layer.self_attn.scaling
        self.norms = [layer.input_layernorm, layer.post_attention_layernorm]
        self.head_norms = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]

    def forward(
        self, x: torch.Tensor, delta: torch.Tensor | None, at: Positions, *, seeds: list[list[int]] | None = None
    ) -> tuple[torch.Tensor | None, Kept]:
        """What is to be added to `middle` to have the layer's output, shape (T, width), and what backward needs.

        With the seeds of an earlier call, what backward needs alone.
        """
        again = iter(seeds or [None] * 4)
        norm, middle_norm = self.norms
        normed = self.qkv.new_input(x)
        x, _, rstd = add_rms_norm(x, delta, norm.weight, norm.variance_epsilon, out=normed[:, : x.shape[1]])
        projected, saved_qkv = self.qkv.forward(normed, seeds=next(again))
        heads, head_rstds, parts = self._to_heads(projected, at)
        with torch.enable_grad():
            inputs = [part.detach().requires_grad_() for part in parts]
            attended = attend(*inputs, scaling=self.scaling, **at.edges)
        out, saved_o = self.o.forward(attended.detach().reshape(len(x), -1), seeds=next(again))
        normed = self.gate_up.new_input(x)
        weight, eps = middle_norm.weight, middle_norm.variance_epsilon
        middle, _, middle_rstd = add_rms_norm(x, out, weight, eps, out=normed[:, : x.shape[1]])
        gate_up, saved_gate_up = self.gate_up.forward(normed, seeds=next(again))
        del normed
        down_seeds = next(again)
        if seeds is None:
            out, saved_down = self.down.forward(swiglu(gate_up), seeds=down_seeds)
        else:  # only A x of the last group is missing, which backward makes from the hidden values
            out, saved_down = None, Saved(None, down_seeds or [])
        saved = [saved_qkv, saved_o, saved_gate_up, saved_down]
        return out, Kept(x, rstd, heads, head_rstds, (attended, inputs), middle, middle_rstd, gate_up, saved)

    def backward(self, grad: torch.Tensor, kept: Kept, at: Positions, *, out: torch.Tensor | None) -> None:
        """Add the adapters' gradients to what is there, and write the input's gradient to `out`, shape (T, width).

        Args:
            grad: the output's gradient in the first columns of what `new_output_grad` gave.
            out: None for the first layer: it reads embeddings, which are frozen.
        """
        saved_qkv, saved_o, saved_gate_up, saved_down = kept.linears
        norm, middle_norm = self.norms
        width = kept.x.shape[1]
        hidden, t = self.down.backward_input(grad, saved_down)
        swiglu_backward_(kept.gate_up, hidden)  # hidden now holds silu(gate) · up, gate_up its gradients
        if saved_down.ax is None:
            saved_down = self.down.project(hidden, seeds=saved_down.seeds)
        self.down.backward_adapters(grad, saved_down, hidden, t)
        del hidden
        by_normed, t = self.gate_up.backward_input(kept.gate_up, saved_gate_up)
        by_middle = self.o.new_output_grad(kept.x)
        _, normed = rms_norm_backward(
            by_normed, kept.middle, middle_norm.weight, kept.middle_rstd, grad[:, :width], out=by_middle[:, :width]
        )
        self.gate_up.backward_adapters(kept.gate_up, saved_gate_up, normed, t)
        del normed, by_normed
        kept.gate_up = kept.middle = None  # type: ignore[assignment]  # the largest goes before more is made
        attended, inputs = kept.attention
        by_attended = self.o.backward(by_middle, saved_o, attended.detach().reshape(len(grad), -1))
        with part("attention"):
            by_parts = torch.autograd.grad(attended, inputs, by_attended.view(attended.shape))
        by_projected = self._from_heads(list(by_parts), kept, at)
        if out is not None:
            by_normed, t = self.qkv.backward_input(by_projected, saved_qkv)
            _, normed = rms_norm_backward(by_normed, kept.x, norm.weight, kept.rstd, by_middle[:, :width], out=out)
        else:
            t = self.qkv.t(by_projected)
            _, normed, _ = add_rms_norm(kept.x, None, norm.weight, norm.variance_epsilon)
        self.qkv.backward_adapters(by_projected, saved_qkv, normed, t)

    def _to_heads(
        self, projected: torch.Tensor, at: Positions
    ) -> tuple[torch.Tensor | None, list[torch.Tensor], list[torch.Tensor]]:
        """q, k, v as (T, heads, head_dim), normed where the model norms heads, and turned by their positions."""
        parts = [projected[:, outputs].unflatten(1, (-1, self.head_dim)) for outputs in self.qkv.outputs]
        kept, rstds = None, []
        if self.head_norms[0] is not None:
            kept = projected
            for number, norm in enumerate(self.head_norms):
                flat = parts[number].reshape(-1, self.head_dim)
                _, normed, rstd = add_rms_norm(flat, None, norm.weight, norm.variance_epsilon)
                parts[number] = normed.view(parts[number].shape)
                rstds.append(rstd)
            for part in parts[:2]:
                rotate(part, part, at.cos, at.sin)
        else:  # side by side, so that one launch turns both
            both = projected[:, : self.qkv.outputs[1].stop].unflatten(1, (-1, self.head_dim))
            rotate(both, both, at.cos, at.sin)
        return kept, rstds, parts

    def _from_heads(self, grads: list[torch.Tensor], kept: Kept, at: Positions) -> torch.Tensor:
        """The gradient of `projected`, shape (T, q + k + v), from those of q, k and v."""
        out = grads[0].new_empty(len(kept.x), self.qkv.outputs[-1].stop)
        targets = [out[:, outputs].unflatten(1, (-1, self.head_dim)) for outputs in self.qkv.outputs]
        for number in range(2):
            rotate(grads[number], targets[number], at.cos, at.sin, back=True)
            norm = self.head_norms[number]
            if norm is not None and kept.heads is not None:
                before = kept.heads[:, self.qkv.outputs[number]].reshape(-1, self.head_dim)
                grad = targets[number].reshape(-1, self.head_dim)
                by_heads, _ = rms_norm_backward(grad, before, norm.weight, kept.head_rstds[number], None)
                targets[number].copy_(by_heads.view(targets[number].shape))
        targets[2].copy_(grads[2])
        return out
