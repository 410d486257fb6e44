"""Loss by hand, answers beside their references, and the questions of general knowledge."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from course_lib import evaluation
from course_lib.chat import answers
from course_lib.chat.answers import answer_ids
from course_lib.data.conversation import Conversation
from course_lib.data.sources import sample_rows
from course_lib.data.templates import choose_template
from course_lib.data.tokenize import IGNORE_INDEX, Example, encode_conversation
from course_lib.errors import InputError
from course_lib.evaluation import evaluate, evaluate_general_knowledge, held_out_loss
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


ROWS: list[Conversation] = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there!"}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "你好"},
            {"role": "assistant", "content": "你好！"},
            {"role": "user", "content": "And in English?"},
            {"role": "assistant", "content": "Hello."},
        ]
    },
    {"text": "A plain text, all of it trained."},
]


@pytest.fixture
def loaded(tiny: Path) -> dict[str, Any]:
    model, tokenizer = load_model(tiny, dtype="float32")
    return {"model": model, "tokenizer": tokenizer, "template": choose_template(tokenizer)}


def test_nothing_to_measure_is_wrong_input(loaded: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="none of 0 rows has anything to measure: there are none"):
        evaluate(rows=[], **loaded)
    with pytest.raises(InputError, match="none of 3 rows has anything to measure: nothing trained within 1 tokens"):
        evaluate(rows=ROWS, max_length=1, **loaded)


@pytest.mark.parametrize("one_product", [True, False])
def test_every_rows_loss_equals_a_computation_by_hand(
    loaded: dict[str, Any], one_product: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows in one padded batch: log-softmax of the full logits, row by row."""
    if not one_product:
        monkeypatch.setattr(loss, "FAMILIES", {})
    result = evaluate(rows=ROWS, **loaded)
    total, count = 0.0, 0
    for row, measured in zip(ROWS, result.rows, strict=True):
        example = encode_conversation(row, loaded["template"], loaded["tokenizer"])
        with torch.no_grad():
            log_probabilities = loaded["model"](torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        by_hand = [
            -log_probabilities[place - 1, label].item()
            for place, label in enumerate(example.labels)
            if label != IGNORE_INDEX and place
        ]
        assert measured.loss == pytest.approx(sum(by_hand), rel=1e-5)
        assert measured.trained_tokens == len(by_hand)
        total, count = total + sum(by_hand), count + len(by_hand)
    assert result["loss"] == pytest.approx(total / count, rel=1e-5)
    assert result["perplexity"] == pytest.approx(2.718281828 ** (total / count), rel=1e-5)
    examples = [encode_conversation(row, loaded["template"], loaded["tokenizer"]) for row in ROWS]
    assert result["loss"] == pytest.approx(held_out_loss(loaded["model"], examples), rel=1e-6)


def test_rows_that_are_cut_or_hold_nothing_are_accounted_for(loaded: dict[str, Any]) -> None:
    long: Conversation = {
        "messages": [{"role": "user", "content": "word " * 300}, {"role": "assistant", "content": "x"}]
    }
    result = evaluate(rows=[ROWS[0], long, ROWS[2]], max_length=100, **loaded)
    assert [row.row for row in result.rows] == [0, 2]
    assert result.dropped == {"nothing trained within 100 tokens": [1]}
    assert "1 rows not measured: nothing trained within 100 tokens" in str(result)


def test_an_answer_follows_all_turns_before_the_last_answer(loaded: dict[str, Any]) -> None:
    progress: list[tuple[str, int, int]] = []
    result = evaluate(rows=ROWS, generate=9, max_new_tokens=5, progress=lambda *done: progress.append(done), **loaded)
    first, second = result.answers  # the plain text has none
    assert (first.question, first.reference) == ("Hi", "Hello there!")
    assert (second.question, second.reference) == ("And in English?", "Hello.")
    (ids,) = answer_ids(loaded["model"], loaded["tokenizer"], ["Hi"], template=loaded["template"], max_new_tokens=5)
    assert first.text == loaded["tokenizer"].decode(ids, skip_special_tokens=True).strip()
    assert progress == [("loss", 3, 3), ("answers", 2, 2)]


def test_answers_are_written_in_batches_that_bound_what_is_kept(
    loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "MOST_ANSWERS", 3)
    monkeypatch.setattr(answers, "MOST_KEPT_TOKENS", 60)
    batches = list(answers._batches([9, 100, 8, 10, 20, 7, 21], max_new_tokens=5))
    assert batches == [[5, 2, 0], [3, 4], [6], [1]]  # 3 rows of 14; 2 of 25, as 3 of 26 are over 60; 26; 105
    assert list(answers._batches([], max_new_tokens=5)) == []


def test_an_answer_is_the_same_in_any_batch(loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "word " * n}, {"role": "assistant", "content": "yes"}]}
        for n in (9, 1, 30, 4)
    ]
    together = evaluate(rows=rows, generate=4, max_new_tokens=6, **loaded).answers
    monkeypatch.setattr(answers, "MOST_ANSWERS", 1)
    assert evaluate(rows=rows, generate=4, max_new_tokens=6, **loaded).answers == together


def test_a_model_that_never_stops_and_one_that_always_does(loaded: dict[str, Any], monkeypatch: Any) -> None:
    options = {"rows": ROWS, "generate": 2, "max_new_tokens": 5, **loaded}
    monkeypatch.setattr(evaluation, "stop_ids", lambda *of: [loaded["tokenizer"].unk_token_id])
    never = evaluate(**options)
    assert (never["stop_rate"], never["answer_tokens"]) == (0.0, 5.0)
    monkeypatch.setattr(evaluation, "stop_ids", lambda *of: list(range(loaded["model"].config.vocab_size)))
    at_once = evaluate(**options)
    assert (at_once["stop_rate"], at_once["answer_tokens"]) == (1.0, 0.0)


def test_answered_rows_are_spread_over_the_file(loaded: dict[str, Any]) -> None:
    rows = [ROWS[2] if number % 2 else ROWS[0] for number in range(20)]
    result = evaluate(rows=rows, generate=4, max_new_tokens=1, **loaded)
    assert [row.row for row in result.rows if row.answer] == [0, 4, 10, 14]
    assert not evaluate(rows=rows, **loaded).answers


def test_general_knowledge_is_judged_by_its_accepted_texts(
    loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "right" not in evaluate_general_knowledge(**loaded, generate=False).metrics()
    rows = sample_rows(evaluation.GENERAL_KNOWLEDGE)
    said = [row["messages"][1]["content"] for row in rows]
    monkeypatch.setattr(evaluation, "_answers", lambda *of: [(text, 3, True) for text in said])
    assert evaluate_general_knowledge(**loaded)["right"] == 1.0
    monkeypatch.setattr(evaluation, "_answers", lambda *of: [(text, 3, True) for text in [*said[1:], said[0]]])
    assert evaluate_general_knowledge(**loaded)["right"] <= 0.05


def test_the_general_questions_are_asked_by_no_sample_that_is_trained_on() -> None:
    def plain(question: str) -> str:
        return re.sub(r"\W", "", question).lower()

    general = {plain(row["messages"][0]["content"]) for row in sample_rows(evaluation.GENERAL_KNOWLEDGE)}
    assert len(general) == 40
    assert not general & {plain(row["instruction"]) for row in sample_rows("general_chat.json")}
