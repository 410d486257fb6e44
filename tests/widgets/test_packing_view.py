from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import traitlets

from course_lib.data.packing import Piece, plan_packs
from course_lib.widgets.packing_view import (
    FOREIGN,
    MOST_PACKS,
    OWN,
    UNSEEN,
    PackingView,
    attention_cells,
    attention_text,
    bar_text,
    foreign_share,
    packing_rows,
    sample_at_cells,
)

STRATEGIES = ("none", "concat", "best-fit")
_random = random.Random(0)
LENGTHS = [_random.randint(1, 64) for _ in range(200)]


def static(view: PackingView) -> str:
    return view._repr_mimebundle_()[0]["text/html"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_numbers_are_those_of_the_plans_report(strategy: Any) -> None:
    report = plan_packs(LENGTHS, max_length=64, strategy=strategy, seed=3).report()
    rows = packing_rows(LENGTHS, max_length=64, strategy=strategy, seed=3)
    assert rows["numbers"] == {
        name: getattr(report, name)
        for name in ("packs", "fill_share", "padding_saved", "samples_cut", "tokens_cut_off", "tokens_lost")
    }
    assert len(rows["packs"]) == min(MOST_PACKS, report.packs)
    assert rows["packs_left_out"] == report.packs - len(rows["packs"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_bars_are_the_packs_of_the_plan(strategy: Any) -> None:
    plan = plan_packs(LENGTHS, max_length=64, strategy=strategy)
    for row in packing_rows(LENGTHS, max_length=64, strategy=strategy)["packs"]:
        pieces = plan[row["number"]]
        assert row["tokens"] == sum(piece.length for piece in pieces) == sum(s["length"] for s in row["segments"])
        assert [segment["label"] for segment in row["segments"]] == [str(piece.example) for piece in pieces]
        assert row["sample_at"] == sample_at_cells(pieces)


def test_a_cut_sample_is_marked_on_both_sides_and_told_in_words() -> None:
    first, second = packing_rows([100], max_length=64, strategy="concat")["packs"]
    assert [(s["begins_earlier"], s["goes_on"]) for row in (first, second) for s in row["segments"]] == [
        (False, True),
        (True, False),
    ]
    assert "36 tokens of it lie in later packs" in first["sentence"]
    assert "began in an earlier pack, 64 tokens before this one" in second["sentence"]
    assert "1 token of it" in packing_rows([65], max_length=64, strategy="concat")["packs"][0]["sentence"]


def test_samples_too_narrow_to_draw_are_drawn_together() -> None:
    row = packing_rows([1] * 300 + [300], max_length=600, strategy="best-fit")["packs"][0]
    assert [(s["samples"], s["length"]) for s in row["segments"] if s["samples"] == 1] == [(1, 300)]
    assert sum(segment["samples"] for segment in row["segments"]) == 301
    assert len(row["segments"]) < 100


@pytest.mark.parametrize("isolated", [True, False])
def test_the_attention_cells_are_the_mask_of_training(isolated: bool) -> None:
    """With a cell for each token, the picture is the mask itself."""
    pieces = [Piece(4, 0, 3), Piece(9, 0, 1), Piece(2, 0, 4)]
    sample_at = sample_at_cells(pieces)
    assert sample_at == [4] * 3 + [9] + [2] * 4
    samples = np.array(sample_at)
    causal, same = np.tril(np.ones((8, 8), dtype=bool)), samples[:, None] == samples[None, :]
    cells = np.array(attention_cells(sample_at, isolated=isolated))
    assert ((cells == OWN) == (causal & same)).all()
    assert ((cells == FOREIGN) == (causal & ~same & (not isolated))).all()
    assert ((cells == UNSEEN) == (~causal | (isolated & ~same))).all()
    assert foreign_share(pieces) == pytest.approx((causal & ~same).sum() / causal.sum())


def test_a_long_pack_is_sampled_in_proportion() -> None:
    cells = sample_at_cells([Piece(0, 0, 1000), Piece(1, 0, 3000)], most=40)
    assert (cells.count(0), cells.count(1)) == (10, 30)


def test_only_concat_says_contamination() -> None:
    for strategy in STRATEGIES:
        rows = packing_rows([30, 30, 30], max_length=64, strategy=strategy)
        assert ("contamination" in rows["packs"][0]["sentence"]) == (strategy == "concat")
        assert (rows["packs"][0]["foreign_share"] > 0) == (strategy == "concat")


def test_the_strategy_is_one_of_those_planned() -> None:
    view = PackingView(LENGTHS, max_length=64)
    assert (view.strategy, [rows["strategy"] for rows in view.views]) == ("none", list(STRATEGIES))
    view.strategy = "best-fit"
    with pytest.raises(traitlets.TraitError, match="'greedy'.* none, concat, best-fit"):
        view.strategy = "greedy"
    with pytest.raises(ValueError, match="at least one"):
        PackingView(LENGTHS, max_length=64, strategies=())


def test_lengths_that_cannot_be_packed_are_refused() -> None:
    with pytest.raises(ValueError, match="65 tokens"):
        PackingView([65], max_length=64)
    assert len(PackingView([65], max_length=64, strategies=["concat"]).views[0]["packs"]) == 2


def test_no_samples_are_no_packs() -> None:
    view = PackingView([], max_length=64)
    assert [rows["packs"] for rows in view.views] == [[], [], []]
    assert static(view).count("No samples.") == 3


def test_many_samples_stay_small() -> None:
    view = PackingView(LENGTHS * 50, max_length=64)
    assert len(static(view)) < 15_000
    assert all(len(rows["packs"]) == MOST_PACKS for rows in view.views)


def test_the_shown_numbers_change_with_the_strategy() -> None:
    view = PackingView([30, 30, 30, 60], max_length=64)
    shown = {rows["strategy"]: dict(rows["shown"]) for rows in view.views}
    assert [shown[name]["packs"] for name in STRATEGIES] == ["4", "3", "3"]
    assert shown["none"]["fill"] == "58.6 %"
    assert shown["concat"]["samples cut"] != "0"
    assert shown["best-fit"]["samples cut"] == "0"
    assert "best-fit 3 packs" in repr(view)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("width", [7, 56])
def test_every_bar_of_text_has_the_same_width(strategy: Any, width: int) -> None:
    for row in packing_rows(LENGTHS, max_length=64, strategy=strategy)["packs"]:
        assert len(bar_text(row, max_length=64, width=width)) == width + 1


def test_a_bar_of_text_shows_samples_cuts_and_room() -> None:
    whole = packing_rows([32, 16], max_length=64, strategy="best-fit")["packs"][0]
    assert bar_text(whole, max_length=64, width=16) == "│   0   │ 1 │░░░│"
    cut, rest = packing_rows([80], max_length=64, strategy="concat")["packs"]
    assert bar_text(cut, max_length=64, width=8) == "│   0   ›"
    assert bar_text(rest, max_length=64, width=8) == "‹0│░░░░░│"


def test_the_attention_text_shows_blocks_or_one_triangle() -> None:
    row = packing_rows([2, 2], max_length=4, strategy="concat")["packs"][0]
    assert attention_text(row, isolated=False) == "██······\n████····\n▒▒▒▒██··\n▒▒▒▒████"
    assert attention_text(row, isolated=True) == "██······\n████····\n····██··\n····████"


def test_the_static_twin_has_all_numbers_bars_and_masks(read_html: Callable) -> None:
    view = PackingView(LENGTHS, max_length=64)
    elements, text = read_html(static(view))
    tags = [tag for tag, _ in elements]
    assert tags.count("table") == 1
    assert [attributes["aria-label"] for _, attributes in elements if attributes.get("role") == "img"] == [
        f"Attention mask, {name}, pack {number}"
        for name, number in zip(
            STRATEGIES,
            [next((p["number"] for p in rows["packs"] if len(p["segments"]) > 1), 0) for rows in view.views],
            strict=True,
        )
    ]
    for rows in view.views:
        assert rows["strategy"] in text
        assert all(name in text and value in text for name, value in rows["shown"])
        assert bar_text(rows["packs"][0], max_length=64) in text
        assert f"and {rows['numbers']['packs'] - 8:,} more packs" in text
    assert "script" not in tags


def test_the_static_twin_escapes_a_strategys_name(read_html: Callable) -> None:
    view = PackingView([3], max_length=64)
    hostile = "<script>\"'"
    view.views = [{**view.views[0], "strategy": hostile}]
    elements, text = read_html(static(view))
    assert "script" not in {tag for tag, _ in elements}
    assert hostile in text


def test_numpy_lengths_and_the_state_a_browser_gets() -> None:
    import json

    view = PackingView(np.array(LENGTHS), max_length=64)
    assert json.loads(json.dumps(view.views))[0]["numbers"] == view.views[0]["numbers"]
    assert static(view) == static(PackingView(LENGTHS, max_length=64))
