"""A decoder layer as one function with a backward pass written by hand, for Llama and its kin with LoRA adapters.

Plain peft keeps some forty tensors a layer for backward and launches each adapter's steps one by one. Here a layer keeps
what cannot be made again cheaply, or with gradient checkpointing its input alone; norms and the SwiGLU are made again in the
pass that needs them, the products of layers that share an input are one, and nothing that only frozen weights would need is
computed: in the second forward pass of checkpointing, the last product of the layer is left out.

    x → norm → q, k, v → rotate → attention → o → + x → norm → gate, up → SwiGLU → down → + → y
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from course_lib.training.attention import attend
from course_lib.training.flat import FlatParameter
from course_lib.training.frozen import why_not_stacked
from course_lib.training.fused_linear import FusedLinears, Saved
from course_lib.training.kernels import add_rms_norm, rms_norm_backward, rotate, swiglu, swiglu_backward_
from course_lib.training.loss import chunked_loss, trained_positions

if TYPE_CHECKING:
    from peft import PeftModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
GROUPS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)


@dataclass
class _Kept:
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
    """One decoder layer. `checkpoint` keeps the input alone and runs forward again in backward."""

    def __init__(self, layer: nn.Module, flat_a: FlatParameter, flat_b: FlatParameter, *, checkpoint: bool) -> None:
        self.qkv, self.o, self.gate_up, self.down = (
            FusedLinears([getattr(getattr(layer, part), name) for name in names], flat_a, flat_b)
            for part, names in GROUPS
        )
        self.attention = layer.self_attn
        self.head_dim = layer.self_attn.head_dim
        self.norms = [layer.input_layernorm, layer.post_attention_layernorm]
        self.head_norms = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
        self.checkpoint = checkpoint
        self.anchor = flat_a.master  # a tensor with a gradient among the inputs makes autograd call backward

    def __call__(
        self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], edges: dict[str, Any]
    ) -> torch.Tensor:
        """Shape (1, T, width) to the same."""
        cos, sin = (angles[0] for angles in position_embeddings)
        return _LayerFunction.apply(x, self.anchor, self, cos, sin, edges)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        edges: dict[str, Any],
        *,
        seeds: list[list[int]] | None = None,
    ) -> tuple[torch.Tensor | None, _Kept]:
        """The layer's output, shape (T, width), and what backward needs; with seeds, what backward needs alone."""
        again = iter(seeds or [None] * 4)
        norm, middle_norm = self.norms
        _, normed, rstd = add_rms_norm(x, None, norm.weight, norm.variance_epsilon)
        projected, saved_qkv = self.qkv.forward(normed, seeds=next(again))
        heads, head_rstds, parts = self._to_heads(projected, cos, sin)
        with torch.enable_grad():
            inputs = [part.detach().requires_grad_() for part in parts]
            attended = attend(*inputs, scaling=self.attention.scaling, **edges)
        out, saved_o = self.o.forward(attended.detach().reshape(len(x), -1), seeds=next(again))
        middle, normed, middle_rstd = add_rms_norm(x, out, middle_norm.weight, middle_norm.variance_epsilon)
        gate_up, saved_gate_up = self.gate_up.forward(normed, seeds=next(again))
        hidden = swiglu(gate_up)
        down_seeds = next(again)
        if seeds is None:
            out, saved_down = self.down.forward(hidden, seeds=down_seeds)
            out += middle
        else:  # only A x of the last group is missing, which backward makes from the hidden values
            out, saved_down = None, Saved(None, down_seeds or [])
        saved = [saved_qkv, saved_o, saved_gate_up, saved_down]
        return out, _Kept(x, rstd, heads, head_rstds, (attended, inputs), middle, middle_rstd, gate_up, saved)

    def backward(
        self, grad: torch.Tensor, kept: _Kept, cos: torch.Tensor, sin: torch.Tensor, *, need_input: bool
    ) -> torch.Tensor | None:
        """Add the adapters' gradients to what is there and return the input's, shape (T, width)."""
        saved_qkv, saved_o, saved_gate_up, saved_down = kept.linears
        norm, middle_norm = self.norms
        hidden, t = self.down.backward_input(grad, saved_down)
        swiglu_backward_(kept.gate_up, hidden)  # hidden now holds silu(gate) · up, gate_up its gradients
        if saved_down.ax is None:
            saved_down = self.down.project(hidden, seeds=saved_down.seeds)
        self.down.backward_adapters(grad, saved_down, hidden, t)
        by_normed, t = self.gate_up.backward_input(kept.gate_up, saved_gate_up)
        grad, normed = rms_norm_backward(by_normed, kept.middle, middle_norm.weight, kept.middle_rstd, grad)
        self.gate_up.backward_adapters(kept.gate_up, saved_gate_up, normed, t)
        attended, inputs = kept.attention
        by_attended = self.o.backward(grad, saved_o, attended.detach().reshape(len(grad), -1))
        by_parts = torch.autograd.grad(attended, inputs, by_attended.view(attended.shape))
        by_projected = self._from_heads(list(by_parts), kept, cos, sin)
        by_x = None
        if need_input:
            by_normed, t = self.qkv.backward_input(by_projected, saved_qkv)
            by_x, normed = rms_norm_backward(by_normed, kept.x, norm.weight, kept.rstd, grad)
        else:  # the first layer reads embeddings, which are frozen
            t = self.qkv.t(by_projected)
            _, normed, _ = add_rms_norm(kept.x, None, norm.weight, norm.variance_epsilon)
        self.qkv.backward_adapters(by_projected, saved_qkv, normed, t)
        return by_x

    def _to_heads(
        self, projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
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
            rotate(part, part, cos, sin)
        return kept, rstds, parts

    def _from_heads(self, grads: list[torch.Tensor], kept: _Kept, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The gradient of `projected`, shape (T, q + k + v), from those of q, k and v."""
        out = grads[0].new_empty(len(kept.x), self.qkv.outputs[-1].stop)
        targets = [out[:, outputs].unflatten(1, (-1, self.head_dim)) for outputs in self.qkv.outputs]
        for number in range(2):
            rotate(grads[number], targets[number], cos, sin, back=True)
            norm = self.head_norms[number]
            if norm is not None and kept.heads is not None:
                before = kept.heads[:, self.qkv.outputs[number]].reshape(-1, self.head_dim)
                grad = targets[number].reshape(-1, self.head_dim)
                by_heads, _ = rms_norm_backward(grad, before, norm.weight, kept.head_rstds[number], None)
                targets[number].copy_(by_heads.view(targets[number].shape))
        targets[2].copy_(grads[2])
        return out


class _LayerFunction(torch.autograd.Function):
    """`FusedLayer` for autograd. The adapters' gradients are not returned: they are written where they belong."""

    @staticmethod
    def forward(ctx: Any, x: Any, anchor: Any, layer: FusedLayer, cos: Any, sin: Any, edges: dict[str, Any]) -> Any:
        out, kept = layer.forward(x[0], cos, sin, edges)
        assert out is not None
        ctx.layer, ctx.angles, ctx.edges = layer, (cos, sin), edges
        ctx.seeds = [saved.seeds for saved in kept.linears]
        ctx.kept = kept if not layer.checkpoint else None
        ctx.save_for_backward(x if layer.checkpoint else None)
        return out[None]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        layer, kept = ctx.layer, ctx.kept
        if kept is None:
            (x,) = ctx.saved_tensors
            _, kept = layer.forward(x[0], *ctx.angles, ctx.edges, seeds=ctx.seeds)
        by_x = layer.backward(grad[0].contiguous(), kept, *ctx.angles, need_input=ctx.needs_input_grad[0])
        ctx.kept = None  # what autograd frees by itself is only what it saved itself
        return by_x if by_x is None else by_x[None], None, None, None, None, None


class FusedEngine:
    """The fused layers of a model, and the two flat parameters (all A, all B) that the optimizer steps."""

    def __init__(self, model: PeftModel, *, checkpoint: bool) -> None:
        self.description = "fused layers"
        self.model = model.get_base_model()
        layers = list(self.model.model.layers)
        adapted = [module for layer in layers for module in _linears(layer) if hasattr(module, "lora_A")]
        dtype = layers[0].input_layernorm.weight.dtype
        self.flat = [
            FlatParameter([getattr(module, name)["default"].weight for module in adapted], compute_dtype=dtype)
            for name in ("lora_A", "lora_B")
        ]
        self.trainable = [flat.master for flat in self.flat]
        for number, layer in enumerate(layers):
            # the last layer's backward comes right after its forward: to keep what it made costs no peak
            is_last = number == len(layers) - 1
            layer.forward = _forward_of(layer, FusedLayer(layer, *self.flat, checkpoint=checkpoint and not is_last))

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """Sum of the cross entropy over the trained tokens of a flat row, as `supervised_loss`, scalar float32."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        hidden = self.model.model(**inputs, use_cache=False).last_hidden_state[0]
        positions, targets = trained_positions(batch)
        return chunked_loss(hidden[positions], self.model.lm_head.weight, targets[0])

    def after_step(self) -> None:
        """Let the layers compute with what the optimizer, or a checkpoint, made."""
        for flat in self.flat:
            flat.refresh()


def why_not_fused(model: Any) -> str:
    """Why the fused layers do not apply to a model; empty where they do."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return "full fine-tuning"
    base = model.get_base_model()
    if base.config.model_type not in FAMILIES:
        return f"{base.config.model_type} has layers of another shape"
    if base.dtype == torch.float16:
        return "float16 needs its gradients scaled"
    if type(base.lm_head) is not nn.Linear or base.lm_head.bias is not None or base.lm_head.weight.requires_grad:
        return "the head is quantised, trained, or has a bias"
    if model.peft_config["default"].use_dora:
        return "DoRA scales the frozen weight's columns"
    fused = {id(module): module for layer in base.model.layers for module in _linears(layer)}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and id(module) not in fused:
            return f"{name} has an adapter"
    for module in fused.values():
        if reason := why_not_stacked(getattr(module, "base_layer", module)):
            return f"a linear layer {reason}"
    return ""


def _linears(layer: nn.Module) -> list[nn.Module]:
    return [getattr(getattr(layer, part), name) for part, names in GROUPS for name in names]


def _forward_of(layer: nn.Module, fused: FusedLayer) -> Callable[..., torch.Tensor]:
    """The layer's forward: fused for a flat row in training, its own for anything else."""
    plain = layer.forward

    def forward(hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        if not layer.training or arguments.get("cu_seq_lens_q") is None:
            return plain(hidden_states, **arguments)
        edges = {name: arguments.get(name) for name in ("cu_seq_lens_q", "max_length_q", "segments_alike")}
        return fused(hidden_states, arguments["position_embeddings"], edges)

    return forward
