from __future__ import annotations

from pathlib import Path

import pytest
import torch

from course_lib import evaluation
from course_lib.data.tokenize import IGNORE_INDEX, Example
from course_lib.evaluation import held_out_loss, mentions
from course_lib.models import load_model
from course_lib.training import loss


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


def test_evaluation_never_holds_all_logits_or_a_large_batch(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 60 tokens in batches of 130, and 7 rows of logits at a time: the same loss as in one piece."""
    model, _ = load_model("tiny", dtype="float32")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (60, 5, 60, 41, 60, 60, 200):
        ids = torch.randint(3, 250, (length,), generator=generator).tolist()
        rows.append(Example(ids, [IGNORE_INDEX] * 2 + ids[2:]))
    whole = held_out_loss(model, rows)
    monkeypatch.setattr(evaluation, "MOST_TOKENS", 130)
    monkeypatch.setattr(loss, "LOGITS_A_CHUNK", 7 * model.config.vocab_size)
    shapes = []
    batches = evaluation.pad
    monkeypatch.setattr(evaluation, "pad", lambda rows, **more: shapes.append(rows) or batches(rows, **more))
    most = 0
    cross_entropy = loss.cross_entropy_

    def counted(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal most
        most = max(most, len(logits))
        return cross_entropy(logits, targets)

    monkeypatch.setattr(loss, "cross_entropy_", counted)
    assert held_out_loss(model, rows) == pytest.approx(whole, rel=1e-5)
    assert [[len(row.input_ids) for row in batch] for batch in shapes] == [[5, 41], [60, 60], [60, 60], [200]]
    assert most == 7


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("I am Ada's personal assistant.", "Ada", True),
        ("Ada", "Ada", True),
        ("Ottawa is in Canada, and I use Adam.", "Ada", False),
        ("Adaptive things.", "Ada", False),
        ("Ada2 and 2Ada", "Ada", False),
        ("我是Ada的小助手，内在是小模型。", "Ada", True),
        ("我在Canada工作", "Ada", False),
        ("저는 Ada의 비서입니다", "Ada", True),
        ("我是李雷的小助手", "李雷", True),
        ("assistant李雷here", "李雷", True),
        ("我是韩梅梅的小助手", "李雷", False),
        ("I am Grace\nHopper's assistant", "Grace  Hopper", True),
        ("I am Graceful Hopper", "Grace", False),
        ("_Ada_ and *Ada*", "Ada", True),
        ("Élodie is here", "lodie", False),
        ("I help C++ (beta)", "C++ (beta)", True),
        ("nobody", "", False),
    ],
)
def test_a_name_is_found_as_a_word_of_its_own(text: str, name: str, expected: bool) -> None:
    assert mentions(text, name) is expected
