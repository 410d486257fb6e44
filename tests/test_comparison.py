"""Before and after: paired bootstrap intervals beside a brute-force computation, and what may not be compared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from course_lib.comparison import LEAST_ROWS, Answer, Evaluation, RowResult, compare
from course_lib.errors import InputError


def answer(**values: object) -> Answer:
    whole = Answer("q", "r", "text", 5, stopped=True, rouge_l=0.5, chrf=20.0, exact=None, right=None)
    return replace(whole, **values)


def evaluations(rows: int, *, gain: float, noise: float, seed: int = 0) -> tuple[Evaluation, Evaluation]:
    """Two evaluations of rows with 1 to 40 trained tokens; the second loses `gain` nats a token."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 40, size=rows)
    before = generator.normal(2, 1, size=rows).clip(0.1)
    after = before - gain + generator.normal(0, noise, size=rows)
    made = [
        Evaluation(tuple(RowResult(n, float(loss * count), int(count)) for n, (loss, count) in enumerate(pairs)))
        for pairs in (list(zip(before, tokens, strict=True)), list(zip(after, tokens, strict=True)))
    ]
    return made[0], made[1]


def test_different_rows_are_refused() -> None:
    before, after = evaluations(12, gain=0.1, noise=0.1)
    with pytest.raises(InputError, match=r"before \(12 rows, .* and after \(11 rows, .* not of the same rows"):
        compare(before, Evaluation(after.rows[1:]))
    first, second = (Evaluation((RowResult(0, 1.0, 1, answer(question=text)),)) for text in ("a", "b"))
    with pytest.raises(InputError, match="not of the same rows"):
        compare(first, second)


def test_what_one_side_alone_measured_is_left_out() -> None:
    before, after = evaluations(12, gain=0.1, noise=0.1)
    answered = Evaluation(tuple(replace(row, answer=answer()) for row in before.rows))
    losses = compare(before, after).changes
    assert compare(answered, after).changes == losses
    assert compare(before, Evaluation(tuple(replace(row, answer=answer()) for row in after.rows))).changes == losses
    assert set(compare(answered, answered).changes) > set(losses)


def test_in_a_notebook_the_text_is_the_table_and_not_every_row() -> None:
    before, after = evaluations(50, gain=0.1, noise=0.1)
    assert repr(before) == str(before)
    assert "RowResult" not in repr(before)
    assert repr(compare(before, after)).splitlines()[0] == str(after).splitlines()[0]


def test_an_unknown_figure_brings_the_nearest() -> None:
    before, after = evaluations(12, gain=0.1, noise=0.1)
    with pytest.raises(
        InputError, match="figure 'los' was not measured; there are loss, perplexity; did you mean loss"
    ):
        compare(before, after)["los"]
    with pytest.raises(InputError, match="figure 'chrf' was not measured"):
        before["chrf"]


def test_the_interval_agrees_with_brute_force() -> None:
    """Another generator, one draw at a time: both ends agree within what 2,000 and 5,000 draws leave to chance."""
    before, after = evaluations(30, gain=0.1, noise=0.3)
    change = compare(before, after)["loss"]
    generator = np.random.RandomState(7)
    differences = []
    for _ in range(5000):
        drawn = [generator.randint(30) for _ in range(30)]
        tokens = sum(before.rows[row].trained_tokens for row in drawn)
        differences.append(
            sum(after.rows[row].loss for row in drawn) / tokens - sum(before.rows[row].loss for row in drawn) / tokens
        )
    low, high = np.percentile(differences, [2.5, 97.5])
    assert change.low == pytest.approx(low, abs=0.1 * (high - low))
    assert change.high == pytest.approx(high, abs=0.1 * (high - low))
    tokens = sum(row.trained_tokens for row in before.rows)
    assert change.before == pytest.approx(sum(row.loss for row in before.rows) / tokens)
    assert change.difference == pytest.approx(sum(row.loss for row in after.rows) / tokens - change.before)


def test_intervals_are_repeatable_and_paired() -> None:
    """Rows differ by whole nats; the gain is a twentieth of that and the same everywhere: only pairing can see it."""
    before, after = evaluations(40, gain=0.05, noise=0.01)
    comparison = compare(before, after)
    assert comparison.as_dict() == compare(before, after).as_dict()
    assert comparison.significant("loss")
    assert comparison["loss"].high < 0
    assert comparison["loss"].high - comparison["loss"].low < 0.02
    assert "better" in str(comparison)
    assert "worse" in str(compare(after, before))


def test_about_one_in_twenty_changes_that_are_none_is_called_significant() -> None:
    found = sum(
        compare(*evaluations(40, gain=0.0, noise=0.3, seed=seed), draws=500).significant("loss") for seed in range(200)
    )
    assert 2 <= found <= 26


def test_few_rows_have_no_interval() -> None:
    before, after = evaluations(LEAST_ROWS - 1, gain=1, noise=0)
    comparison = compare(before, after)
    assert (comparison["loss"].low, comparison.significant("loss")) == (None, False)
    assert f"fewer than {LEAST_ROWS} rows" in str(comparison)
    assert compare(*evaluations(LEAST_ROWS, gain=1, noise=0)).significant("loss")


def test_losses_of_other_tokens_are_not_compared() -> None:
    before, after = (Evaluation(tuple(RowResult(n, 2.0, tokens, answer()) for n in range(10))) for tokens in (3, 4))
    comparison = compare(before, after)
    assert "loss" not in comparison.changes
    assert "perplexity" not in comparison.changes
    assert "their losses cannot be compared" in comparison.caption
    assert not comparison.significant("rouge_l")


def test_a_figure_is_over_the_rows_that_have_a_part_in_it() -> None:
    rows = [
        RowResult(0, 3.0, 2, answer(exact=True, stopped=False, tokens=7)),
        RowResult(1, 5.0, 6, answer(exact=None, rouge_l=1.0)),
        RowResult(2, 0.0, 2),
    ]
    figures = Evaluation(tuple(rows)).metrics()
    assert figures == {
        "loss": pytest.approx(0.8),
        "perplexity": pytest.approx(np.exp(0.8)),
        "exact_match": 1.0,
        "rouge_l": 0.75,
        "chrf": 20.0,
        "stop_rate": 0.5,
        "answer_tokens": 6.0,
    }


def test_tables_hold_every_figure_and_html_is_escaped() -> None:
    before, after = evaluations(12, gain=0.3, noise=0.05)
    comparison = compare(before, replace(after, dropped={"<b>": [9]}))
    lines = str(comparison).splitlines()
    assert lines[1].split() == ["before", "after", "change", "95%", "interval"]
    assert lines[2].startswith("loss, nats a token")
    html = comparison._repr_html_()
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    assert html.count("<tr>") == 3
    assert before._repr_html_().count("<tr>") == 3
