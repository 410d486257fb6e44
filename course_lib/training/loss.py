"""Next-token cross entropy, computed only where a token is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from course_lib.data.tokenize import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def supervised_loss(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """Sum of the cross entropy over the trained tokens of a batch.

    The head is applied only to positions whose next token is trained (`logits_to_keep`): prompts cost no logits.
    The caller divides by the trained tokens of the whole global batch, so that gradient accumulation changes nothing.

    Args:
        batch: what `flatten` or `pad` returns, on the model's device.

    Returns:
        Scalar float32.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    targets = batch["labels"][:, 1:]
    positions = (targets != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)
    logits = model(**inputs, logits_to_keep=positions, use_cache=False).logits  # (rows, len(positions), vocabulary)
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets[:, positions].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def trained_tokens(batch: dict[str, Any]) -> int:
    """How many tokens of a batch the loss sees."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
