"""Examples to tensors: one flat row without padding, or a padded rectangle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from course_lib.data.tokenize import IGNORE_INDEX, Example

if TYPE_CHECKING:
    import torch

    from course_lib.data.packing import PackPlan


def flatten(examples: Sequence[Example], *, isolate: bool = True) -> dict[str, torch.Tensor | int]:
    """Lay examples end to end in one row, with no padding.

    Args:
        isolate: false takes the examples as one, as a pack of strategy `concat` does: positions run on, each sample
            sees those before it, and its first token, where labelled, is predicted from the sample before.

    Returns:
        input_ids, labels, position_ids: int64, shape (1, tokens); positions restart at each example.
        cu_seq_lens_q, cu_seq_lens_k: int32, shape (examples + 1,): where each example starts, and the end
            (the names transformers passes to its attention functions).
        max_length_q, max_length_k: the longest example.

        The first label of each example is -100: it would be predicted from the example before.
    """
    import torch

    if not isolate:
        examples = [join(examples)]
    input_ids = [token for example in examples for token in example.input_ids]
    labels = [label for example in examples for label in [IGNORE_INDEX, *example.labels[1:]]]
    positions = [position for example in examples for position in range(len(example.input_ids))]
    edges = [0]
    for example in examples:
        edges.append(edges[-1] + len(example.input_ids))
    cu_seq_lens = torch.tensor(edges, dtype=torch.int32)
    longest = max(len(example.input_ids) for example in examples)
    return {
        "input_ids": torch.tensor([input_ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def join(examples: Sequence[Example]) -> Example:
    """Make one example of several, so that nothing after it knows where one ended and the next began."""
    return Example(
        input_ids=[token for example in examples for token in example.input_ids],
        labels=[label for example in examples for label in example.labels],
    )


def pad(examples: Sequence[Example], *, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Right-pad examples to the longest. The mask is made from lengths, never from the pad id: pad may equal EOS.

    Returns:
        input_ids, attention_mask, labels: int64, shape (examples, longest).
    """
    import torch

    longest = max(len(example.input_ids) for example in examples)
    batch = {
        "input_ids": torch.full((len(examples), longest), pad_token_id),
        "attention_mask": torch.zeros((len(examples), longest), dtype=torch.int64),
        "labels": torch.full((len(examples), longest), IGNORE_INDEX),
    }
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        batch["input_ids"][row, :length] = torch.tensor(example.input_ids)
        batch["attention_mask"][row, :length] = 1
        batch["labels"][row, 1:length] = torch.tensor(example.labels[1:])
    return batch


def examples_of_pack(plan: PackPlan, number: int, examples: Sequence[Example]) -> list[Example]:
    """Examples of a pack. Where the plan does not isolate samples they become one: the pack is what attention sees."""
    if plan.isolated:
        return [examples[piece.example] for piece in plan[number]]
    cut = [(examples[example], slice(start, start + length)) for example, start, length in plan[number]]
    return [join([Example(example.input_ids[part], example.labels[part]) for example, part in cut])]
