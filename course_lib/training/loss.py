"""Next-token cross entropy, computed only where a token is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from course_lib.data.tokenize import IGNORE_INDEX
from course_lib.training.kernels import cross_entropy_

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LOGITS_A_CHUNK = 2**27  # 268 MB in 16 bits: a thousand rows or more, enough to keep a large GPU's matrix units busy


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


def chunked_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropy of a frozen head's logits, which are never all there at once.

    The gradient by `hidden` is made in the same pass, chunk by chunk, while a chunk's logits are at hand.

    Args:
        hidden: shape (rows, width): what the head reads, of trained positions only.
        weight: shape (vocabulary, width).
        targets: int64, shape (rows,).

    Returns:
        Scalar float32.
    """
    return _ChunkedLoss.apply(hidden, weight, targets)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        by_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = max(1, LOGITS_A_CHUNK // len(weight))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = hidden[part] @ weight.t()
            total += cross_entropy_(logits, targets[part]).sum()
            if by_hidden is not None:
                torch.mm(logits, weight, out=by_hidden[part])
        ctx.by_hidden = by_hidden
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        by_hidden, ctx.by_hidden = ctx.by_hidden, None
        return by_hidden.mul_(grad), None, None


class PlainEngine:
    """The model's own layers, run by autograd."""

    def __init__(self, model: PreTrainedModel, reason: str) -> None:
        self.description = f"the model's own layers ({reason})"
        self.model = model
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """`supervised_loss` of the model."""
        return supervised_loss(self.model, batch)

    def after_step(self) -> None:
        """Nothing: the layers compute with what the optimizer steps."""


def trained_tokens(batch: dict[str, Any]) -> int:
    """How many tokens of a batch the loss sees."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
