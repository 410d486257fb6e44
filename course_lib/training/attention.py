"""Attention over a flat row of several examples, none of which sees another.

transformers isolates packed samples under SDPA only while no 2-D mask and no cache is given, and mixes them in
silence otherwise. Here nothing can mix: on a GPU in 16 bits PyTorch's variable-length flash attention gets the edges of
the samples; elsewhere each sample is its own call of scaled_dot_product_attention, and no time goes into the empty blocks
of a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a build of torch without flash attention
    varlen_attn = None

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

SEGMENTS = "segments"


def segments_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment of one flat row, in transformers' attention interface.

    Args:
        query: shape (1, heads, tokens, head_dim); key and value: (1, key_value_heads, tokens, head_dim).
        cu_seq_lens_q: int32, shape (segments + 1,): where each segment starts, and the end. On the CPU or, for
            variable-length attention, on the device of the query: it is never copied here, so no layer waits.
        max_length_q: the longest segment.

    Returns:
        Shape (1, tokens, heads, head_dim), and no attention weights.

    Raises:
        ValueError: `cu_seq_lens_q` is missing: without it, samples would see each other.
    """
    if cu_seq_lens_q is None:
        raise ValueError(
            "segments attention needs cu_seq_lens_q; call the model with what data/collate.py's flatten() returns"
        )
    if varlen_attn is not None and cu_seq_lens_q.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        groups = query.shape[1] // key.shape[1]
        output = varlen_attn(
            query[0].transpose(0, 1),
            repeat_kv(key, groups)[0].transpose(0, 1),
            repeat_kv(value, groups)[0].transpose(0, 1),
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(-1, 0),  # all earlier tokens, no later ones: causal
        )
        return output.unsqueeze(0), None
    outputs = [
        sdpa_attention_forward(
            module,
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            attention_mask=None,
            scaling=scaling,
            **kwargs,
        )[0]
        for start, end in pairwise(cu_seq_lens_q.tolist())
    ]
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(SEGMENTS, segments_attention_forward)


def supports_segments(model: PreTrainedModel, *, longest: int) -> bool:
    """Whether the model takes its attention from transformers' interface and attends to all earlier tokens of `longest`."""
    window = (
        getattr(model.config, "sliding_window", None) if getattr(model.config, "use_sliding_window", True) else None
    )
    return bool(getattr(model, "_supports_attention_backend", False)) and (window is None or longest <= window)


@contextmanager
def attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Use an attention implementation for a while: `segments` for flat rows, `sdpa` to generate."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
