"""Frozen linear layers that read the same input, as one matrix product."""

from __future__ import annotations

import torch
from torch import nn

from course_lib.training.fused_sizes import NF4_BLOCK, NF4_GROUP, aligned
from course_lib.training.kernels import dequantise_nf4
from course_lib.training.parts import part

_scratch: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}


class FrozenLinears:
    """Weights of some linear layers stacked over their outputs: (W x + b) of all of them is one product.

    The layers' own tensors become slices of the stack. NF4 weights are dequantised at each use, into one buffer that all
    stacks share: on one stream a product has read the buffer before the next stack writes it.

    There is room for more rows below W, or more columns beside it: an adapter's matrices in there become part of the product.

    Attributes:
        out_features: outputs of each layer.
        bias: shape (sum of outputs,), or None where no layer has one.
        tensors: what W is made from.
        lasting: what is written beside or below W stays there until W is used again.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        *,
        dtype: torch.dtype,
        device: torch.device,
        more_rows: int = 0,
        more_columns: int = 0,
    ) -> None:
        self.dtype = dtype
        self.out_features = [layer.out_features for layer in layers]
        self.rows, self.columns = sum(self.out_features), layers[0].in_features
        self.more_rows, self.more_columns = more_rows, more_columns
        self._shape = (self.rows + more_rows, self.columns + aligned(more_columns))
        self.bias = _stacked_bias(layers, dtype, device)
        self._layers = layers
        self._code: torch.Tensor | None = None
        if hasattr(layers[0].weight, "quant_state"):
            self._code = layers[0].weight.quant_state.code.to(device)
            self.tensors = _joined_nf4(layers)
        else:
            whole = layers[0].weight.new_empty(self._shape)
            torch.cat([layer.weight.data for layer in layers], out=whole[: self.rows, : self.columns])
            self.tensors = [whole]
        self.lasting = self._code is None
        self.give_layers(self.tensors)

    def whole(self) -> torch.Tensor:
        """W with its further rows and columns, shape (rows + more_rows, columns + more_columns).

        Valid until the next call on any stack of NF4 weights.
        """
        if self._code is None:
            return self.tensors[0][:, : self.columns + self.more_columns]
        packed, absmax, *nested = self.tensors
        buffer = _scratch_buffer(self._shape[0] * self._shape[1], self.dtype, packed.device).view(self._shape)
        with part("dequantise"):
            dequantise_nf4(packed, absmax, tuple(nested) or None, self._code, buffer[: self.rows, : self.columns])
        return buffer[:, : self.columns + self.more_columns]

    def weight(self) -> torch.Tensor:
        """W, shape (rows, columns). Valid as long as `whole`."""
        return self.whole()[: self.rows, : self.columns]

    def give_layers(self, tensors: list[torch.Tensor]) -> None:
        """Make the layers' own weights slices of these tensors, which are like `tensors` in shape and type."""
        if self._code is None:
            parts = tensors[0][: self.rows, : self.columns].split(self.out_features)
            for layer, part in zip(self._layers, parts, strict=True):
                layer.weight.data = part
            return
        start = 0
        for layer in self._layers:
            state, shape = layer.weight.quant_state, layer.weight.shape
            end = start + layer.out_features * layer.in_features // NF4_BLOCK
            layer.weight.data = tensors[0][start * 32 : end * 32].view(shape)
            state.absmax = tensors[1][start:end]
            if state.nested:
                state.state2.code, state.state2.absmax = tensors[2], tensors[3][start // NF4_GROUP : end // NF4_GROUP]
                state.offset = tensors[4][start // NF4_GROUP]
            start = end


def _joined_nf4(layers: list[nn.Module]) -> list[torch.Tensor]:
    """bitsandbytes' 4-bit weights end to end, so that one launch dequantises them all: packed, absmax, and for doubly quantised
    ones the code of absmax, its factors and its offsets (kernels.dequantise_nf4)."""
    states = [layer.weight.quant_state for layer in layers]
    tensors = [
        torch.cat([layer.weight.data.flatten() for layer in layers]),
        torch.cat([state.absmax for state in states]),
    ]
    if states[0].nested:
        inner = [state.state2 for state in states]
        offsets = [state.offset.expand(len(state2.absmax)) for state, state2 in zip(states, inner, strict=True)]
        tensors += [inner[0].code, torch.cat([state2.absmax for state2 in inner]), torch.cat(offsets)]
    return tensors


def why_not_stacked(layer: nn.Module) -> str:
    """Why a frozen linear layer cannot be part of a stack; empty where it can."""
    if type(layer) is nn.Linear:
        return ""
    state = getattr(layer.weight, "quant_state", None)
    if type(layer).__name__ == "Linear8bitLt":
        return "holds int8"
    if type(layer).__name__ != "Linear4bit" or state is None:
        return f"is a {type(layer).__name__}"
    weights = layer.in_features * layer.out_features
    if (
        state.quant_type != "nf4"
        or state.blocksize != NF4_BLOCK
        or (state.nested and state.state2.blocksize != NF4_GROUP)
    ):
        return f"holds {state.quant_type} in blocks of {state.blocksize}"
    if weights % (NF4_BLOCK * NF4_GROUP if state.nested else NF4_BLOCK):
        return f"has {weights} weights, no whole number of quantisation blocks"
    return ""


def _stacked_bias(layers: list[nn.Module], dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    parts = [torch.zeros(layer.out_features) if layer.bias is None else layer.bias.data for layer in layers]
    return torch.cat([part.to(device, dtype) for part in parts])


def _scratch_buffer(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    buffer = _scratch.get((dtype, device))
    if buffer is None or len(buffer) < size:
        buffer = _scratch[dtype, device] = torch.empty(size, dtype=dtype, device=device)
    return buffer[:size]
