"""Next-token cross entropy, computed only where a token is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from course_lib.data.tokenize import IGNORE_INDEX
from course_lib.training.fused_sizes import FAMILIES, LOGITS_A_CHUNK
from course_lib.training.kernels import cross_entropy_
from course_lib.training.parts import part_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from course_lib.training.host_memory import HostHead


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
    positions, targets = trained_positions(batch)
    logits = model(**inputs, logits_to_keep=positions, use_cache=False).logits  # (rows, len(positions), vocabulary)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


@torch.no_grad()
def evaluated_loss(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """`supervised_loss` without a gradient, and without all logits at once where the head is one product.

    For 8 rows of 2,048 tokens and a vocabulary of 150,000, the logits alone would take 25 GB on the way to the loss.
    """
    head = _one_product(model)
    if head is None:
        return supervised_loss(model, batch)
    targets = batch["labels"][:, 1:]
    trained = targets != IGNORE_INDEX
    return _head_loss(_hidden(model, batch)[trained], head, targets[trained])


@torch.no_grad()
def evaluated_row_losses(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """`evaluated_loss` of each row of a batch by itself: float32, shape (rows,)."""
    head = _one_product(model)
    if head is None:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        positions, targets = trained_positions(batch)
        logits = model(**inputs, logits_to_keep=positions, use_cache=False).logits.float()
        losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none")
        return losses.sum(1)
    rows = zip(_hidden(model, batch), batch["labels"][:, 1:], strict=True)
    return torch.stack(
        [_head_loss(hidden[of_row != IGNORE_INDEX], head, of_row[of_row != IGNORE_INDEX]) for hidden, of_row in rows]
    )


def _one_product(model: PreTrainedModel) -> Any:
    """The head, where logits are what it makes of the last layer's output, and nothing comes behind it; else None."""
    base = _base(model)
    head = base.get_output_embeddings()
    is_one = base.config.model_type in FAMILIES and (type(head) is nn.Linear or hasattr(head, "slices"))
    return head if is_one else None


def _base(model: PreTrainedModel) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _hidden(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """What the head reads to predict every token but the first: shape (rows, tokens - 1, width)."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return _base(model).model(**inputs, use_cache=False).last_hidden_state[:, :-1]


def _head_loss(hidden: torch.Tensor, head: Any, targets: torch.Tensor) -> torch.Tensor:
    if hasattr(head, "slices"):
        return streamed_loss(hidden, head, targets, gradient=False)[0]
    return chunked_loss(hidden, head.weight, targets, gradient=False)[0]


def trained_positions(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions whose next token is trained in at least one row, and those next tokens' labels.

    Returns:
        On the device of the input ids: int64, shapes (positions,) and (rows, positions). With labels on the CPU, the GPU
        is not waited for.
    """
    targets = batch["labels"][:, 1:]
    positions = (targets != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)
    return to_device(positions, batch["input_ids"].device), to_device(targets[:, positions], batch["input_ids"].device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to a device; to a GPU from pinned memory, so that no one waits for what the GPU has still to do."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@part_of("head")
def chunked_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, gradient: bool, chunk: int | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum of the cross entropy of a frozen head's logits, which are never all there at once.

    Args:
        hidden: shape (rows, width): what the head reads, of trained positions only.
        weight: shape (vocabulary, width).
        targets: int64, shape (rows,).
        gradient: make that by `hidden` in the same pass, chunk by chunk, while a chunk's logits are at hand.
        chunk: rows whose logits are there at one time; by default as many as make LOGITS_A_CHUNK.

    Returns:
        Scalar float32, and the gradient, shaped and typed as `hidden`.
    """
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    by_hidden = torch.empty_like(hidden) if gradient else None
    rows = chunk or max(1, LOGITS_A_CHUNK // len(weight))
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        logits = hidden[part] @ weight.t()
        total += cross_entropy_(logits, targets[part]).sum()
        if by_hidden is not None:
            torch.mm(logits, weight, out=by_hidden[part])
    return total, by_hidden


@part_of("head")
def streamed_loss(
    hidden: torch.Tensor, head: HostHead, targets: torch.Tensor, *, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`chunked_loss` for a head in host memory, which passes by once, slice by slice of the vocabulary.

    The normaliser of the softmax is known only at the end: sums are kept relative to the largest logit so far and shrunk
    where a larger one comes (Milakov and Gimelshein 2018), and so is the gradient's sum of weighted rows.
    """
    rows = len(hidden)
    largest = hidden.new_full((rows,), float("-inf"), dtype=torch.float32)
    total, of_target = torch.zeros_like(largest), torch.zeros_like(largest)
    expected = hidden.new_zeros(hidden.shape, dtype=torch.float32)  # sum of the head's rows by their probability
    row_of_target = torch.zeros_like(hidden)
    for first, weight in head.slices(rows):
        logits = (hidden @ weight.t()).float()
        at = targets - first
        inside, at = (at >= 0) & (at < len(weight)), at.clamp(0, len(weight) - 1)
        of_target = torch.where(inside, logits.gather(1, at[:, None])[:, 0], of_target)
        before, largest = largest, torch.maximum(largest, logits.amax(1))
        shrink = (before - largest).exp_()
        logits.sub_(largest[:, None]).exp_()
        total.mul_(shrink).add_(logits.sum(1))
        if gradient:
            expected.mul_(shrink[:, None]).add_(logits.to(hidden.dtype) @ weight)
            row_of_target.add_(weight[at].mul_(inside[:, None]))
    loss = (largest + total.log() - of_target).sum()
    return loss, expected.div_(total[:, None]).sub_(row_of_target).to(hidden.dtype) if gradient else None


def trained_tokens(batch: dict[str, Any]) -> int:
    """How many tokens of a batch the loss sees."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
