"""Answers to several questions at once: their ids, and where they end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from course_lib.chat.answers import answer_ids, answer_questions
from course_lib.data.templates import choose_template

QUESTIONS = ["Hi", "A longer question, so that the rows are padded", "?"]


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> tuple[Any, Any]:
    from course_lib.models import load_model

    return load_model(tiny)


def test_ids_decode_to_the_answers(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    template = choose_template(tokenizer)
    ids = answer_ids(model, tokenizer, QUESTIONS, template=template, max_new_tokens=6)
    texts = answer_questions(model, tokenizer, QUESTIONS, template=template, max_new_tokens=6)
    assert [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)] == texts
    assert all(1 <= len(answer) <= 6 for answer in ids)


def test_an_answer_ends_with_the_stop_id_that_came_first_and_others_are_cut_at_the_limit(
    loaded: tuple[Any, Any],
) -> None:
    model, tokenizer = loaded
    options = {"template": choose_template(tokenizer), "max_new_tokens": 6}
    unstopped = answer_ids(model, tokenizer, QUESTIONS, stop=[tokenizer.unk_token_id], **options)
    assert all(len(answer) == 6 for answer in unstopped)
    stop = unstopped[0][2]
    stopped = answer_ids(model, tokenizer, QUESTIONS, stop=[stop], **options)
    for answer, whole in zip(stopped, unstopped, strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert answer == whole[:end]
