"""The decoder of Llama and its kin as one function: every layer forward, the loss, and every layer backward, by hand.

Autograd sees one step. So it is known here what comes next: sums between layers are made inside the norm that reads them, a
gradient is written where the next layer reads it, and what lies in host memory is fetched one layer ahead.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from course_lib.training.flat import FlatParameter
from course_lib.training.frozen import why_not_stacked
from course_lib.training.fused_layer import FusedLayer, Kept, Positions
from course_lib.training.fused_sizes import FAMILIES, GROUPS, checkpointed_layers
from course_lib.training.host_memory import FetchedLayers, HostHead, StoredInputs, TwoPlaces
from course_lib.training.kernels import add_rms_norm, rms_norm_backward
from course_lib.training.loss import chunked_loss, streamed_loss, trained_positions
from course_lib.training.offload import place

if TYPE_CHECKING:
    from peft import PeftModel


class FusedEngine:
    """The fused layers of a model, and the two flat parameters (all A, all B) that the optimizer steps."""

    def __init__(
        self,
        model: PeftModel,
        *,
        checkpoint: bool | int,
        offload: Collection[str] = (),
        device: torch.device | None = None,
        places: type[TwoPlaces] | None = None,
        loss_chunk: int | None = None,
    ) -> None:
        """`checkpoint` keeps of each layer, or of that many, its input alone and runs it again in backward.

        `offload` names what stays in host memory (offload.py); the rest goes to `device`, by default where the adapters are.
        `places` says where the layers' frozen weights are kept instead of there, such as in shards (shards.py). `loss_chunk` is
        `loss.chunked_loss`'s.
        """
        self.description = "fused layers"
        if places is None and "layers" in offload:
            places = TwoPlaces
        base = model.get_base_model()
        device = device or next(p.device for p in model.parameters() if p.requires_grad)
        place(base, [*offload, "layers"] if places else offload, device)
        self.embedding, self.rotary, self.norm = base.model.embed_tokens, base.model.rotary_emb, base.model.norm
        self.head, self.loss_chunk = base.lm_head, loss_chunk
        modules = list(base.model.layers)
        adapted = [module for layer in modules for module in _linears(layer) if hasattr(module, "lora_A")]
        dtype = self.norm.weight.dtype
        self.flat = [
            FlatParameter([getattr(module, name)["default"].weight for module in adapted], compute_dtype=dtype)
            for name in ("lora_A", "lora_B")
        ]
        self.named_trainable = {"lora_A": self.flat[0].master, "lora_B": self.flat[1].master}
        self.trainable = [*self.named_trainable.values()]
        self.layers = [FusedLayer(layer, *self.flat) for layer in modules]
        self.checkpointed = checkpointed_layers(checkpoint, len(modules))
        frozen = [[group.frozen for group in layer.groups] for layer in self.layers]
        self.fetched = FetchedLayers(frozen, modules, device, places) if places else None
        self.stored = StoredInputs(device) if "checkpoints" in offload and checkpoint else None

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """Sum of the cross entropy over the trained tokens of a flat row, as `supervised_loss`, scalar float32."""
        return _DecoderLoss.apply(self.trainable[0], self, batch)

    def after_step(self) -> None:
        """Let the layers compute with what the optimizer, or a checkpoint, made."""
        for flat in self.flat:
            flat.refresh()
        for layer in self.layers:
            for group in layer.groups:
                group.after_step()

    def forward(self, batch: dict[str, Any], *, keep: bool) -> tuple[torch.Tensor, _Passed | None]:
        """The loss, and with `keep` what backward needs."""
        embedded = self.embedding(batch["input_ids"])
        cos, sin = self.rotary(embedded, batch["position_ids"])
        edges = {name: batch.get(name) for name in ("cu_seq_lens_q", "max_length_q", "segments_alike")}
        passed = _Passed(Positions(cos[0], sin[0], edges), embedded[0].shape)
        x, delta = embedded[0], None
        for number, layer in enumerate(self.layers):
            if self.fetched:
                self.fetched.use(number, then=number + 1)
            delta, kept = layer.forward(x, delta, passed.at)
            if keep:
                passed.layers.append(self._keep(number, kept))
            x = kept.middle
            del kept
        positions, targets = trained_positions(batch)
        rows, normed, rstd = add_rms_norm(x[positions], delta[positions], self.norm.weight, self.norm.variance_epsilon)
        del x, delta
        if isinstance(self.head, HostHead):
            loss, by_normed = streamed_loss(normed, self.head, targets[0], gradient=keep)
        else:
            weight, chunk = self.head.weight, self.loss_chunk
            loss, by_normed = chunked_loss(normed, weight, targets[0], gradient=keep, chunk=chunk)
        if by_normed is not None:
            passed.rows = _Rows(positions, rows, rstd, by_normed)
        return loss, passed

    def backward(self, grad: torch.Tensor, passed: _Passed) -> None:
        """Add every adapter's gradient, times `grad`, to the flat parameters'."""
        layers, width = self.layers, passed.shape[1]
        above, passed.rows = passed.rows, None
        assert above is not None
        by_rows, _ = rms_norm_backward(above.by_normed.mul_(grad), above.rows, self.norm.weight, above.rstd, None)
        by_output = layers[-1].down.new_output_grad(by_rows.new_empty(passed.shape))
        by_output[:, :width].zero_().index_copy_(0, above.positions, by_rows)
        del above, by_rows
        for number in reversed(range(len(layers))):
            if self.fetched:
                self.fetched.use(number, then=number - 1)
            kept = passed.layers.pop()
            if isinstance(kept, _Again):
                x = self.stored.use(number) if self.stored else kept.x
                _, kept = layers[number].forward(x, None, passed.at, seeds=kept.seeds)
            by_input = layers[number - 1].down.new_output_grad(kept.x) if number else None
            layers[number].backward(by_output, kept, passed.at, out=None if by_input is None else by_input[:, :width])
            by_output = by_input

    def _keep(self, number: int, kept: Kept) -> Kept | _Again:
        if number >= self.checkpointed:
            return kept
        seeds = [saved.seeds for saved in kept.linears]
        if not self.stored:
            return _Again(kept.x, seeds)
        self.stored.store(number, kept.x)
        return _Again(None, seeds)


@dataclass
class _Again:
    """What is kept of a layer that runs forward again: its input, unless that is in host memory, and its dropout's seeds."""

    x: torch.Tensor | None
    seeds: list[list[int]]


@dataclass
class _Rows:
    """What the last norm's backward needs, of trained positions only."""

    positions: torch.Tensor
    rows: torch.Tensor
    rstd: torch.Tensor
    by_normed: torch.Tensor


@dataclass
class _Passed:
    """What one forward pass leaves for backward."""

    at: Positions
    shape: torch.Size  # (T, width)
    layers: list[Kept | _Again] = field(default_factory=list)
    rows: _Rows | None = None


class _DecoderLoss(torch.autograd.Function):
    """`FusedEngine.loss` for autograd. The adapters' gradients are not returned: they are written where they belong."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, engine: FusedEngine, batch: dict[str, Any]) -> torch.Tensor:
        # the anchor, a tensor with a gradient, makes autograd call backward
        ctx.engine = engine
        loss, ctx.passed = engine.forward(batch, keep=ctx.needs_input_grad[0])
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        passed, ctx.passed = ctx.passed, None  # what autograd frees by itself is only what it saved itself
        ctx.engine.backward(grad, passed)
        return None, None, None


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
    if (
        type(base.lm_head) not in (nn.Linear, HostHead)
        or base.lm_head.bias is not None
        or base.lm_head.weight.requires_grad
    ):
        return "the head is quantised, trained, or has a bias"
    if model.peft_config["default"].use_dora:
        return "DoRA scales the rows of frozen weights"
    fused = {id(module): module for layer in base.model.layers for module in _linears(layer)}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and id(module) not in fused:
            return f"{name} has an adapter"
    for module in fused.values():
        if reason := why_not_stacked(getattr(module, "base_layer", module)):
            return f"a linear layer {reason}"
    return ""


def _linears(layer: nn.Module) -> list[nn.Module]:
    return [getattr(getattr(layer, part), name) for part, names, _ in GROUPS for name in names]
