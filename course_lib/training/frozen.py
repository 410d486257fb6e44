"""Frozen linear layers that read the same input, as one matrix product."""

from __future__ import annotations

import torch
from torch import nn

from course_lib.training.kernels import dequantise_nf4

_scratch: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}


class FrozenLinears:
    """Weights of some linear layers stacked over their outputs: (W x + b) of all of them is one product.

    The layers' own tensors become slices of the stack. NF4 weights are dequantised at each use, into one buffer that all
    stacks share: on one stream a product has read the buffer before the next stack writes it.

    Attributes:
        out_features: outputs of each layer.
        bias: shape (sum of outputs,), or None where no layer has one.
    """

    def __init__(self, layers: list[nn.Module], *, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.out_features = [layer.out_features for layer in layers]
        self.shape = (sum(self.out_features), layers[0].in_features)
        self.bias = _stacked_bias(layers, dtype)
        self._weight = _StackedNF4(layers) if hasattr(layers[0].weight, "quant_state") else _stacked(layers)

    def weight(self) -> torch.Tensor:
        """Shape (sum of outputs, inputs). Valid until the next call on any stack of NF4 weights."""
        if isinstance(self._weight, torch.Tensor):
            return self._weight
        buffer = _scratch_buffer(self.shape[0] * self.shape[1], self.dtype, self._weight.packed.device)
        self._weight.write(buffer)
        return buffer.view(self.shape)


class _StackedNF4:
    """bitsandbytes' 4-bit weights end to end, so that one launch dequantises them all."""

    def __init__(self, layers: list[nn.Module]) -> None:
        states = [layer.weight.quant_state for layer in layers]
        self.code = states[0].code
        self.packed = torch.cat([layer.weight.data.flatten() for layer in layers])
        self.absmax = torch.cat([state.absmax for state in states])
        self.nested = None
        if states[0].nested:
            inner = [state.state2 for state in states]
            offsets = [state.offset.expand(len(state2.absmax)) for state, state2 in zip(states, inner, strict=True)]
            self.nested = inner[0].code, torch.cat([state2.absmax for state2 in inner]), torch.cat(offsets)
        packed = self.packed.split([layer.weight.numel() for layer in layers])
        absmax = self.absmax.split([len(state.absmax) for state in states])
        for layer, state, own, scale in zip(layers, states, packed, absmax, strict=True):
            layer.weight.data, state.absmax = own.view(layer.weight.shape), scale

    def write(self, out: torch.Tensor) -> None:
        dequantise_nf4(self.packed, self.absmax, self.nested, self.code, out)


def why_not_stacked(layer: nn.Module) -> str:
    """Why a frozen linear layer cannot be part of a stack; empty where it can."""
    if type(layer) is nn.Linear:
        return ""
    state = getattr(layer.weight, "quant_state", None)
    if type(layer).__name__ != "Linear4bit" or state is None:
        return f"is a {type(layer).__name__}"
    weights = layer.in_features * layer.out_features
    if state.quant_type != "nf4" or state.blocksize != 64 or (state.nested and state.state2.blocksize != 256):
        return f"holds {state.quant_type} in blocks of {state.blocksize}"
    if weights % (64 * 256 if state.nested else 64):
        return f"has {weights} weights, no whole number of quantisation blocks"
    return ""


def _stacked(layers: list[nn.Module]) -> torch.Tensor:
    stack = torch.cat([layer.weight.data for layer in layers])
    for layer, part in zip(layers, stack.split([layer.out_features for layer in layers]), strict=True):
        layer.weight.data = part
    return stack


def _stacked_bias(layers: list[nn.Module], dtype: torch.dtype) -> torch.Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    device = layers[0].weight.device
    parts = [
        torch.zeros(layer.out_features, device=device) if layer.bias is None else layer.bias.data for layer in layers
    ]
    return torch.cat([part.to(dtype) for part in parts])


def _scratch_buffer(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    buffer = _scratch.get((dtype, device))
    if buffer is None or len(buffer) < size:
        buffer = _scratch[dtype, device] = torch.empty(size, dtype=dtype, device=device)
    return buffer[:size]
