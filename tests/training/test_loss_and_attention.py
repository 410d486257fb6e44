"""Invariants 3 and 4: samples do not see each other, and neither padding nor accumulation changes loss or gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from course_lib.data.collate import flatten, pad
from course_lib.data.tokenize import IGNORE_INDEX, Example
from course_lib.models import load_model
from course_lib.training.attention import (
    SEGMENTS,
    attention,
    describe_attention,
    segments_attention_forward,
    supports_segments,
)
from course_lib.training.listeners import read_metrics
from course_lib.training.loop import train
from course_lib.training.loss import supervised_loss, trained_tokens


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    torch.manual_seed(0)
    return load_model("tiny", dtype="float32")[0]


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for length, prompt in ((17, 5), (40, 30), (9, 2), (25, 24)):
        ids = torch.randint(3, 250, (length,), generator=generator).tolist()
        made.append(Example(ids, [IGNORE_INDEX] * prompt + ids[prompt:]))
    return made


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def plain_loss(model: Any, example: Example) -> torch.Tensor:
    """Written out: full logits of one row, shifted by one, summed."""
    ids = torch.tensor([example.input_ids])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
    return F.cross_entropy(logits, torch.tensor(example.labels[1:]), ignore_index=IGNORE_INDEX, reduction="sum")


@pytest.mark.parametrize("layout", ["flat", "padded", "one by one"])
def test_every_layout_gives_the_loss_and_gradients_of_single_rows(
    model: Any, examples: list[Example], layout: str
) -> None:
    expected_loss = sum(plain_loss(model, example) for example in examples)
    expected = gradients(model, expected_loss)
    if layout == "flat":
        with attention(model, SEGMENTS):
            loss = supervised_loss(model, flatten(examples))
            got = gradients(model, loss)
    elif layout == "padded":
        loss = supervised_loss(model, pad(examples, pad_token_id=2))
        got = gradients(model, loss)
    else:
        loss = sum(supervised_loss(model, pad([example], pad_token_id=2)) for example in examples)
        got = gradients(model, loss)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_isolated_samples_equal_single_rows_under_eager_attention_too(model: Any, examples: list[Example]) -> None:
    with attention(model, "eager"):
        expected_loss = sum(plain_loss(model, example) for example in examples)
        expected = gradients(model, expected_loss)
    with attention(model, SEGMENTS):
        loss = supervised_loss(model, flatten(examples))
        got = gradients(model, loss)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_contamination_would_be_seen(model: Any, examples: list[Example]) -> None:
    """The test above can fail: the same flat row under one causal mask gives another loss."""
    batch = flatten(examples)
    with attention(model, SEGMENTS):
        isolated = supervised_loss(model, batch).item()
    mixed = {name: batch[name] for name in ("input_ids", "labels")}
    assert abs(supervised_loss(model, mixed).item() - isolated) > 1e-3


def test_segments_refuse_to_run_without_edges() -> None:
    query = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        segments_attention_forward(torch.nn.Module(), query, query, query, None)


def test_attention_is_put_back(model: Any) -> None:
    before = model.config._attn_implementation
    with attention(model, SEGMENTS):
        assert model.config._attn_implementation == SEGMENTS
    assert model.config._attn_implementation == before


def test_a_sliding_window_shorter_than_the_rows_is_padded_instead(model: Any) -> None:
    assert supports_segments(model, longest=100)
    model.config.sliding_window = 50
    try:
        assert not supports_segments(model, longest=100)
        assert supports_segments(model, longest=50)
    finally:
        del model.config.sliding_window


def test_trained_tokens_of_a_batch(examples: list[Example]) -> None:
    assert (
        trained_tokens(flatten(examples))
        == trained_tokens(pad(examples, pad_token_id=0))
        == sum(e.trained_tokens for e in examples)
    )


def test_the_log_says_which_attention_runs_and_why(make: Any, tmp_path: Path) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert "padded" in describe_attention(flat=False, device=gpu, mixed_precision="bf16")
    assert "no GPU" in describe_attention(flat=True, device=cpu, mixed_precision="no")
    assert "16 bits" in describe_attention(flat=True, device=gpu, mixed_precision="no")
    assert "variable-length" in describe_attention(flat=True, device=gpu, mixed_precision="bf16")
    train(make(training={"max_steps": 1}), work_dir=tmp_path / "run")
    assert "once a sample (no GPU)" in read_metrics(tmp_path / "run")[0]["attention"]
