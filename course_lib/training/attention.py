"""Attention over a flat row of several examples, none of which sees another.

transformers isolates packed samples under SDPA only while no 2-D mask and no cache is given, and mixes them in
silence otherwise. Here each example is its own call of scaled_dot_product_attention, so there is nothing to mix,
and no time goes into the blocks of a mask that are empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

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
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment of one flat row, in transformers' attention interface.

    Args:
        query: shape (1, heads, tokens, head_dim); key and value: (1, key_value_heads, tokens, head_dim).
        cu_seq_lens_q: int32 on the CPU, shape (segments + 1,): where each segment starts, and the end.

    Returns:
        Shape (1, tokens, heads, head_dim), and no attention weights.

    Raises:
        ValueError: `cu_seq_lens_q` is missing: without it, samples would see each other.
    """
    if cu_seq_lens_q is None:
        raise ValueError(
            "segments attention needs cu_seq_lens_q; call the model with what data/collate.py's flatten() returns"
        )
    edges = cu_seq_lens_q.tolist()
    outputs = [
        sdpa_attention_forward(
            module, query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], attention_mask=None, **kwargs
        )[0]
        for start, end in pairwise(edges)
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
