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
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from course_lib.training.parts import part_of

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
    segments_alike: bool = False,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment of one flat row, in transformers' attention interface.

    Args:
        query: shape (1, heads, tokens, head_dim); key and value: (1, key_value_heads, tokens, head_dim).
        cu_seq_lens_q: int32, shape (segments + 1,): where each segment starts, and the end. On the CPU or, for
            variable-length attention, on the device of the query: it is never copied here, so no layer waits.
        max_length_q: the longest segment.
        segments_alike: all segments are that long.

    Returns:
        Shape (1, tokens, heads, head_dim), and no attention weights.

    Raises:
        ValueError: `cu_seq_lens_q` is missing: without it, samples would see each other.
    """
    if cu_seq_lens_q is None:
        raise ValueError(
            "segments attention needs cu_seq_lens_q; call the model with what data/collate.py's flatten() returns"
        )
    # squeeze, not [0]: the backward pass of an index fills a tensor of zeros and copies into it
    flat = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))
    edges = {"cu_seq_lens_q": cu_seq_lens_q, "max_length_q": max_length_q, "segments_alike": segments_alike}
    return attend(*flat, **edges, scaling=scaling)[None], None


@part_of("attention")
def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int | None,
    scaling: float | None,
    segments_alike: bool = False,
) -> torch.Tensor:
    """Causal attention within each segment.

    Args:
        query: shape (tokens, heads, head_dim); key and value: (tokens, key_value_heads, head_dim).
        segments_alike: all have `max_length_q` tokens, so that they are a batch.

    Returns:
        Shape (tokens, heads, head_dim).
    """
    groups = query.shape[1] // key.shape[1]
    if takes_edges(query) and cu_seq_lens_q.is_cuda:
        if groups > 1:
            key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        causal = (-1, 0)  # all earlier tokens, no later ones
        edges, longest = cu_seq_lens_q, max_length_q
        if segments_alike:
            return _attend_batch(query, key, value, longest=longest, scaling=scaling)
        return varlen_attn(query, key, value, edges, edges, longest, longest, scale=scaling, window_size=causal)
    outputs = []
    for start, end in pairwise(cu_seq_lens_q.tolist()):
        parts = (part[start:end].transpose(0, 1)[None] for part in (query, key, value))
        attended = F.scaled_dot_product_attention(*parts, is_causal=True, scale=scaling, enable_gqa=groups > 1)
        outputs.append(attended.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def _attend_batch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, longest: int, scaling: float | None
) -> torch.Tensor:
    """`attend` where every segment has `longest` tokens: by cuDNN, which on an H100 takes 0.6 of flash attention's time.

    For segments of different lengths it fails with an illegal instruction there (PyTorch 2.11), so they stay with flash attention.
    """
    batch = (part.unflatten(0, (-1, longest)).transpose(1, 2) for part in (query, key, value))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        return F.scaled_dot_product_attention(*batch, is_causal=True, scale=scaling).transpose(1, 2).flatten(0, 1)


def takes_edges(query: torch.Tensor) -> bool:
    """Whether attention over tensors like this one takes the edges of the segments on the GPU, in one call."""
    return varlen_attn is not None and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


def describe_attention(*, flat: bool, device: torch.device, mixed_precision: str) -> str:
    """Which attention a run's layers use, and why, for its log."""
    if not flat:
        return "scaled_dot_product_attention over padded rows (the model does not take its attention from transformers, or a window is shorter than a row)"
    if device.type != "cuda":
        return "scaled_dot_product_attention, once a sample (no GPU)"
    if mixed_precision == "no":
        return "scaled_dot_product_attention, once a sample (flash attention is for 16 bits)"
    if varlen_attn is None:
        return "scaled_dot_product_attention, once a sample (this PyTorch has no variable-length attention)"
    return "variable-length flash attention over packs; cuDNN where all samples of a batch are of one length"


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
