from __future__ import annotations

import bisect
import math
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.data.packing import PackPlan, Piece, _place_best_fit, pack_tokens, plan_packs

MAX_LENGTH = 64
lengths_that_fit = st.lists(st.integers(1, MAX_LENGTH), max_size=200)


def naive_best_fit_decreasing(lengths: list[int], max_length: int) -> list[int]:
    """The room left in each pack, one example after the other."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = bisect.bisect_left(rooms, length)
        room = rooms.pop(at) if at < len(rooms) else max_length
        bisect.insort(rooms, room - length)
    return sorted(rooms)


def rows(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Every token a number of its own, and where each example starts."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return np.arange(offsets[-1], dtype=np.int32), offsets


def same(one: PackPlan, other: PackPlan) -> bool:
    names = ("pack_offsets", "example", "start", "length")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


@given(lengths_that_fit, st.integers(0, 3))
def test_best_fit_keeps_every_example_whole_in_one_pack_that_fits(lengths: list[int], seed: int) -> None:
    plan = plan_packs(lengths, max_length=MAX_LENGTH, strategy="best-fit", seed=seed)
    packs = list(plan)
    assert sorted(piece for pack in packs for piece in pack) == [
        Piece(number, 0, length) for number, length in enumerate(lengths)
    ]
    assert all(sum(piece.length for piece in pack) <= MAX_LENGTH for pack in packs)
    assert all(packs)


@given(lengths_that_fit)
def test_counted_best_fit_decreasing_is_the_naive_one(lengths: list[int]) -> None:
    placements, packs = _place_best_fit(np.bincount(lengths, minlength=MAX_LENGTH + 1), MAX_LENGTH)
    rooms = [MAX_LENGTH] * packs
    for length, first, taking, each in placements:
        for pack in range(first, first + taking):
            rooms[pack] -= each * length
    assert sorted(rooms) == naive_best_fit_decreasing(lengths, MAX_LENGTH)


@given(lengths_that_fit)
def test_never_more_packs_than_best_fit_decreasing_nor_fewer_than_can_be(lengths: list[int]) -> None:
    # fewer where filling packs exactly does better: see `_place_by_filling`
    packs = len(plan_packs(lengths, max_length=MAX_LENGTH, strategy="best-fit"))
    assert math.ceil(sum(lengths) / MAX_LENGTH) <= packs <= len(naive_best_fit_decreasing(lengths, MAX_LENGTH))


def test_filling_beats_best_fit_decreasing_where_its_greed_leaves_room() -> None:
    lengths = [6, 5, 3, 2, 2, 2]  # best fit puts 6 with 3 and leaves one of 10 empty; 6 + 2 + 2 and 5 + 3 + 2 fill both
    assert len(naive_best_fit_decreasing(lengths, 10)) == 3
    assert len(plan_packs(lengths, max_length=10, strategy="best-fit")) == 2


@given(st.lists(st.integers(1, 3 * MAX_LENGTH), max_size=100), st.integers(0, 3))
def test_concat_fills_every_pack_but_the_last_and_keeps_the_order_of_tokens(lengths: list[int], seed: int) -> None:
    plan = plan_packs(lengths, max_length=MAX_LENGTH, strategy="concat", seed=seed)
    tokens, offsets = rows(lengths)
    packed = pack_tokens(plan, tokens, offsets)
    assert sorted(packed.tolist()) == tokens.tolist()
    # an example's tokens follow one another: only at an end of an example may the next token be another's
    jumps = set((packed[:-1][np.diff(packed) != 1] + 1).tolist())
    assert jumps <= set(offsets.tolist())
    sizes = np.diff(plan.token_offsets()).tolist()
    assert all(size == MAX_LENGTH for size in sizes[:-1])
    assert all(0 < size <= MAX_LENGTH for size in sizes)
    assert (plan.length > 0).all()


def test_concat_by_hand() -> None:
    """Two examples of 5 in packs of 4: XTuner's way, with the tail kept."""
    plan = plan_packs([5, 5], max_length=4, strategy="concat", seed=0)
    first, second = (0, 1) if plan[0][0].example == 0 else (1, 0)
    assert list(plan) == [
        [Piece(first, 0, 4)],
        [Piece(first, 4, 1), Piece(second, 0, 3)],
        [Piece(second, 3, 2)],
    ]
    assert plan[-1] == plan[2]
    assert not plan.isolated
    assert plan.segment_edges(1).tolist() == [0, 4]
    report = plan.report()
    assert (report.samples_cut, report.tokens_cut_off, report.tokens_lost) == (2, 3, 0)
    assert (report.packs, report.packs_at_least) == (3, 3)


def test_best_fit_by_hand() -> None:
    lengths = [5, 3, 4, 4, 6, 2, 1, 1, 1]
    plan = plan_packs(lengths, max_length=8, strategy="best-fit")
    assert sorted(sorted(piece.example for piece in pack) for pack in plan)[:3] == [[0, 1], [2, 3], [4, 5]]
    report = plan.report()
    assert (report.examples, report.tokens, report.packs, report.packs_at_least) == (9, 27, 4, 4)
    assert report.fill_share == 27 / 32
    # eight rows padded to 6 hold 48 tokens, 26 of them real; the ninth stands alone. Packs: 8, 8, 8 and 3
    assert (report.padding_unpacked, report.padding_packed, report.padding_saved) == (22, 5, 17)
    assert (report.samples_cut, report.tokens_cut_off, report.tokens_lost) == (0, 0, 0)
    pack = next(number for number in range(4) if len(plan[number]) == 3)
    assert plan.isolated
    assert plan.segment_edges(pack).tolist() == [0, 1, 2, 3]
    assert plan.segment_edges(pack).dtype == np.int32


def test_none_keeps_the_order() -> None:
    plan = plan_packs([3, 8, 1], max_length=8, strategy="none", seed=5)
    assert list(plan) == [[Piece(0, 0, 3)], [Piece(1, 0, 8)], [Piece(2, 0, 1)]]
    assert plan.report().padding_saved == 0


@pytest.mark.parametrize("strategy", ["concat", "best-fit"])
def test_the_plan_follows_from_the_seed_alone(strategy: str) -> None:
    lengths = np.random.RandomState(0).randint(1, 30, size=300)
    plans = [plan_packs(lengths, max_length=64, strategy=strategy, seed=seed) for seed in (1, 1, 2, -1)]
    assert same(plans[0], plans[1])
    assert not same(plans[0], plans[2])
    assert same(plans[0], plan_packs(lengths.tolist(), max_length=64, strategy=strategy, seed=1))


def test_plans_are_the_same_on_every_machine() -> None:
    lengths = [7, 3, 5, 5, 5, 2, 6, 3, 3, 1]
    best_fit = plan_packs(lengths, max_length=10, strategy="best-fit", seed=7)
    concat = plan_packs(lengths, max_length=10, strategy="concat", seed=7)
    assert [[piece.example for piece in pack] for pack in best_fit] == [[2, 4], [6, 1, 9], [0, 7], [3, 8, 5]]
    assert concat.example.tolist() == [8, 5, 0, 0, 2, 1, 9, 7, 3, 6, 6, 4]


@pytest.mark.parametrize("strategy", ["none", "best-fit"])
def test_too_long_an_example_is_named(strategy: str) -> None:
    with pytest.raises(ValueError, match="example 1 has 9 tokens, more than max_length 8"):
        plan_packs([3, 9], max_length=8, strategy=strategy)


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(ValueError, match="example 1 has 0 tokens"):
        plan_packs([3, 0], max_length=8, strategy="concat")
    with pytest.raises(ValueError, match="unknown packing strategy 'wrapped'; there are none, concat, best-fit"):
        plan_packs([3], max_length=8, strategy="wrapped")
    with pytest.raises(ValueError, match="max_length is 0"):
        plan_packs([3], max_length=0, strategy="concat")
    with pytest.raises(IndexError, match="pack 1 of 1"):
        plan_packs([3], max_length=8, strategy="none")[1]


@pytest.mark.parametrize("strategy", ["none", "concat", "best-fit"])
def test_no_examples_make_no_packs(strategy: str) -> None:
    plan = plan_packs([], max_length=8, strategy=strategy)
    assert len(plan) == 0
    assert list(plan) == []
    report = plan.report()
    assert (report.packs, report.fill_share, report.padding_saved, report.samples_cut) == (0, 0.0, 0, 0)
    assert len(pack_tokens(plan, *rows([]))) == 0


@given(lengths_that_fit, st.sampled_from(["none", "concat", "best-fit"]))
def test_tokens_go_where_the_plan_says(lengths: list[int], strategy: str) -> None:
    plan = plan_packs(lengths, max_length=MAX_LENGTH, strategy=strategy)
    tokens, offsets = rows(lengths)
    packed, edges = pack_tokens(plan, tokens, offsets), plan.token_offsets()
    for number, pack in enumerate(plan):
        wanted = [tokens[offsets[example] + start :][:length] for example, start, length in pack]
        assert np.array_equal(packed[edges[number] : edges[number + 1]], np.concatenate(wanted))


def test_tokens_are_written_to_a_file_in_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("course_lib.data.packing.PIECES_A_COPY", 7)
    lengths = np.random.RandomState(0).randint(1, 65, size=500).tolist()
    plan = plan_packs(lengths, max_length=64, strategy="best-fit")
    tokens, offsets = rows(lengths)
    out = np.memmap(tmp_path / "packed.bin", dtype=np.int32, mode="w+", shape=tokens.shape)
    assert pack_tokens(plan, tokens, offsets, out=out) is out
    out.flush()
    assert np.array_equal(np.fromfile(tmp_path / "packed.bin", dtype=np.int32), pack_tokens(plan, tokens, offsets))


def test_tokens_of_other_examples_are_refused() -> None:
    plan = plan_packs([3, 2], max_length=8, strategy="best-fit")
    tokens, offsets = rows([3, 2])
    with pytest.raises(ValueError, match="other lengths than the plan"):
        pack_tokens(plan, *rows([2, 3]))
    with pytest.raises(ValueError, match=r"out has shape \(4,\) and dtype int32, not \(5,\) and int32"):
        pack_tokens(plan, tokens, offsets, out=np.empty(4, dtype=np.int32))


@pytest.mark.parametrize("sigma", [0.5, 0.8, 1.2])
def test_a_million_rows_are_planned_in_a_moment_and_hardly_a_token_of_room_is_left(sigma: float) -> None:
    spread = np.random.RandomState(0).normal(scale=sigma, size=1_000_000)
    lengths = np.clip(np.exp(np.log(310) - sigma**2 / 2 + spread).round(), 1, 2048).astype(np.int32)
    start = time.perf_counter()
    plan = plan_packs(lengths, max_length=2048, strategy="best-fit")
    assert time.perf_counter() - start < 3
    report = plan.report()
    assert report.packs <= 1.0002 * report.packs_at_least
    assert report.tokens_lost == report.samples_cut == 0
    assert np.array_equal(np.sort(plan.example), np.arange(1_000_000))
