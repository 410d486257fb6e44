"""How good a model is: the loss on rows it was not trained on, and whether its answers hold a name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from course_lib.data.collate import pad
from course_lib.data.tokenize import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel


MOST_TOKENS = 2048  # a batch, padding and all, unless one row is longer: evaluation takes no more memory than training


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, examples: Sequence[Example], *, batch_size: int = 8) -> float:
    """Mean cross entropy in nats over the trained tokens of `examples`: each token counts the same.

    Rows are sorted by length so that little is padded. The model is put into evaluation mode and attends as it is set to, in
    any way that takes padded rows (not `segments`); `load_model` sets SDPA.
    """
    from course_lib.training.loss import evaluated_loss, trained_tokens

    model.eval()
    total, count = 0.0, 0
    for rows in _batches(sorted(examples, key=lambda example: len(example.input_ids)), batch_size):
        batch = {name: value.to(model.device) for name, value in pad(rows, pad_token_id=0).items()}
        total += evaluated_loss(model, batch).item()
        count += trained_tokens(batch)
    return total / count


def _batches(by_length: Sequence[Example], batch_size: int) -> Iterator[Sequence[Example]]:
    """At most `batch_size` rows, and `MOST_TOKENS` tokens of their rectangle."""
    rows: list[Example] = []
    for example in by_length:
        if rows and (len(rows) == batch_size or (len(rows) + 1) * len(example.input_ids) > MOST_TOKENS):
            yield rows
            rows = []
        rows.append(example)
    if rows:
        yield rows


def mentions(text: str, name: str) -> bool:
    """Whether a name stands in a text as a word of its own: Ada does not stand in "Canada", but does in "我是Ada的小助手".

    Chinese, Japanese and Korean set no spaces between words, so their characters may stand beside a name, and a name written in
    them may stand beside anything.
    """
    name, text = " ".join(name.split()), " ".join(text.split())
    before = rf"(?<!{_OF_A_WORD})" if re.match(_OF_A_WORD, name) else ""
    after = rf"(?!{_OF_A_WORD})" if re.search(rf"{_OF_A_WORD}\Z", name) else ""
    return bool(name) and re.search(before + re.escape(name) + after, text) is not None


# a letter or digit, but none of CJK and kana, Hangul, CJK compatibility, and CJK beyond the first plane
_OF_A_WORD = r"[^\W_\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]"
