"""How good a model is: the loss on rows it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from course_lib.data.collate import pad
from course_lib.data.tokenize import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, examples: Sequence[Example], *, batch_size: int = 8) -> float:
    """Mean cross entropy in nats over the trained tokens of `examples`: each token counts the same.

    Rows are sorted by length so that little is padded; the model runs in evaluation mode under SDPA.
    """
    from course_lib.training.loss import supervised_loss, trained_tokens

    model.eval()
    by_length = sorted(examples, key=lambda example: len(example.input_ids))
    total, count = 0.0, 0
    for start in range(0, len(by_length), batch_size):
        batch = {
            name: value.to(model.device)
            for name, value in pad(by_length[start : start + batch_size], pad_token_id=0).items()
        }
        total += supervised_loss(model, batch).item()
        count += trained_tokens(batch)
    return total / count
