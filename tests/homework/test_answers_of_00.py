"""The rows of homework 00: with every seed, each careless way to count gives another score than the right one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from course_lib.homework.checks_00_answers import QUESTIONS, WAYS, has_word, measured, score_of


@given(st.integers(0, 9_999))
def test_every_way_to_count_is_told_from_the_others_and_something_is_lost(seed: int) -> None:
    rows = measured(seed)
    assert [row["question"] for row in rows] == list(QUESTIONS)
    assert rows == measured(seed)
    scores = [score_of(way, rows, "before") for way in (has_word, *WAYS.values())]
    assert len(set(scores)) == len(scores)
    right = [[any(has_word(word, row[when]) for word in row["words"]) for row in rows] for when in ("before", "after")]
    assert sum(right[0]) == sum(right[1])
    assert right[0] != right[1]


def test_the_answers_are_what_they_are_listed_as() -> None:
    for words, right, wrong in QUESTIONS.values():
        assert all(any(has_word(word, said) for word in words) for said in right)
        assert not any(has_word(word, said) for said in wrong for word in words)
