from __future__ import annotations

from pathlib import Path

import pytest
import torch

from course_lib.data.tokenize import IGNORE_INDEX, Example
from course_lib.evaluation import held_out_loss
from course_lib.models import load_model


def test_held_out_loss_equals_a_computation_by_hand(tiny: Path) -> None:
    """Three rows: log-softmax of the full logits, summed over trained tokens, over their number."""
    model, _ = load_model("tiny", dtype="float32")
    rows = [
        Example(ids, [IGNORE_INDEX] * prompt + ids[prompt:])
        for ids, prompt in (([5, 6, 7, 8], 2), ([9, 10], 1), ([11] * 9, 4))
    ]
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            log_probabilities = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        for position, label in enumerate(row.labels):
            if label != IGNORE_INDEX:
                total -= log_probabilities[position - 1, label].item()
                count += 1
    assert count == 2 + 1 + 5
    assert held_out_loss(model, rows) == pytest.approx(total / count, rel=1e-5)
    assert held_out_loss(model, rows, batch_size=1) == pytest.approx(total / count, rel=1e-5)
