from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.data.collate import flatten, pad
from course_lib.data.packing import plan_packs
from course_lib.data.tokenize import IGNORE_INDEX, Example


@given(st.lists(st.integers(1, 64), max_size=200))
def test_every_example_stands_in_exactly_one_pack_that_fits(lengths: list[int]) -> None:
    packs = plan_packs(lengths, max_length=64, strategy="best-fit")
    assert sorted(number for pack in packs for number in pack) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in pack) <= 64 for pack in packs)
    # best-fit decreasing never needs more than 11/9 of the optimum + 1, and the optimum is at least the sum
    assert len(packs) >= math.ceil(sum(lengths) / 64)


def test_best_fit_finds_the_perfect_packing_of_an_easy_case() -> None:
    assert sorted(map(sorted, plan_packs([5, 3, 4, 4, 6, 2], max_length=8, strategy="best-fit"))) == [
        [0, 1],
        [2, 3],
        [4, 5],
    ]


def test_too_long_an_example_is_named() -> None:
    with pytest.raises(ValueError, match="example 1 has 9 tokens"):
        plan_packs([3, 9], max_length=8, strategy="best-fit")


EXAMPLES = [Example([1, 2, 3], [IGNORE_INDEX, 2, 3]), Example([4, 5], [4, 5])]


def test_flat_rows_restart_positions_and_never_train_a_first_token() -> None:
    batch = flatten(EXAMPLES)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 2, 3, IGNORE_INDEX, 5]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert batch["max_length_q"] == 3


def test_padding_is_masked_by_length_even_where_pad_is_the_end_token() -> None:
    end = 5  # also the pad id: a mask made from ids would hide the trained end of the second row
    batch = pad(EXAMPLES, pad_token_id=end)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, end]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 2, 3], [IGNORE_INDEX, 5, IGNORE_INDEX]]


def test_trained_tokens_counts_what_the_loss_sees() -> None:
    assert [example.trained_tokens for example in EXAMPLES] == [2, 1]
