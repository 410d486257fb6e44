"""Evaluations row by row, and two of them side by side: what changed, and whether it is more than chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from course_lib.errors import InputError, did_you_mean
from course_lib.tables import as_html, as_text

LEAST_ROWS = 10  # with fewer, a bootstrap interval is too narrow to be believed: none is given


@dataclass(frozen=True)
class Answer:
    """A model's greedy answer to one row, and its scores. `exact` and `right` are None where they say nothing."""

    question: str
    reference: str
    text: str
    tokens: int  # without the one that ended it
    stopped: bool  # the model ended its turn; else it was cut
    rouge_l: float  # 0 to 1
    chrf: float  # 0 to 100
    exact: bool | None
    right: bool | None


@dataclass(frozen=True)
class ToolStep:
    """One assistant turn of a row with tools: what was due after all turns before it, and what the model wrote.

    `right_tool` and `right_arguments` are None where an answer was due, `answered` (and not called) where a call was,
    `grounded` (it says what the tools returned and nothing they did not) where no tool had returned anything.
    """

    question: str
    expected: str
    text: str
    tool: str  # the one to call, "" for an answer
    stopped: bool
    right_tool: bool | None = None
    right_arguments: bool | None = None
    answered: bool | None = None
    grounded: bool | None = None


@dataclass(frozen=True)
class RowResult:
    """What was measured on one row; `row` counts from 0, `loss` is the sum over the trained tokens, in nats."""

    row: int
    loss: float
    trained_tokens: int
    answer: Answer | None = None
    steps: tuple[ToolStep, ...] = ()


@dataclass(frozen=True)
class _Metric:
    """A figure that is a sum over rows by another: `parts` gives both of a row, or None where the row has no part in it."""

    label: str
    parts: Callable[[RowResult], tuple[float, float] | None]
    better: int  # -1: less is better, 1: more is better, 0: neither
    digits: int = 3
    shown: Callable[[Any], Any] = lambda ratio: ratio


def _of_answer(value: Callable[[Answer], float | None]) -> Callable[[RowResult], tuple[float, float] | None]:
    def parts(row: RowResult) -> tuple[float, float] | None:
        found = None if row.answer is None else value(row.answer)
        return None if found is None else (float(found), 1.0)

    return parts


def _of_steps(value: Callable[[ToolStep], bool | None]) -> Callable[[RowResult], tuple[float, float] | None]:
    def parts(row: RowResult) -> tuple[float, float] | None:
        found = [one for step in row.steps if (one := value(step)) is not None]
        return (float(sum(found)), float(len(found))) if found else None

    return parts


def _loss(row: RowResult) -> tuple[float, float]:
    return row.loss, row.trained_tokens


METRICS: dict[str, _Metric] = {
    "loss": _Metric("loss, nats a token", _loss, -1),
    "perplexity": _Metric("perplexity", _loss, -1, 2, np.exp),
    "right": _Metric("right answers", _of_answer(lambda answer: answer.right), 1, 2),
    "exact_match": _Metric("exact match", _of_answer(lambda answer: answer.exact), 1, 2),
    "rouge_l": _Metric("ROUGE-L, 0 to 1", _of_answer(lambda answer: answer.rouge_l), 1),
    "chrf": _Metric("chrF, 0 to 100", _of_answer(lambda answer: answer.chrf), 1, 1),
    "stop_rate": _Metric("ended its turn", _of_answer(lambda answer: answer.stopped), 1, 2),
    "right_tool": _Metric("right tool", _of_steps(lambda step: step.right_tool), 1),
    "right_arguments": _Metric("right tool and arguments", _of_steps(lambda step: step.right_arguments), 1),
    "answered": _Metric("answered where no call was due", _of_steps(lambda step: step.answered), 1),
    "grounded": _Metric("answer grounded in the result", _of_steps(lambda step: step.grounded), 1),
    "answer_tokens": _Metric("tokens an answer", _of_answer(lambda answer: answer.tokens), 0, 1),
}


@dataclass(frozen=True, repr=False)
class Evaluation:
    """A model's results, row by row, and the rows that could not be measured, by reason."""

    rows: tuple[RowResult, ...]
    dropped: dict[str, list[int]] = field(default_factory=dict)

    def __getitem__(self, metric: str) -> float:
        """A figure of `METRICS`, such as `evaluation["loss"]`.

        Raises:
            InputError: no such figure, or no row has a part in it.
        """
        return _find(self.metrics(), metric)

    def metrics(self) -> dict[str, float]:
        """Every figure that at least one row has a part in."""
        figures = {}
        for name, metric in METRICS.items():
            parts = _parts(metric, self.rows)
            if len(parts):
                figures[name] = float(metric.shown(parts[:, 0].sum() / parts[:, 1].sum()))
        return figures

    @property
    def answers(self) -> list[Answer]:
        """The answers, in the order of their rows."""
        return [row.answer for row in self.rows if row.answer is not None]

    def as_dict(self) -> dict[str, Any]:
        """Figures and rows as plain data."""
        return {"metrics": self.metrics(), "rows": [asdict(row) for row in self.rows], "dropped": self.dropped}

    def _table(self) -> list[list[str]]:
        figures = [
            [METRICS[name].label, f"{value:,.{METRICS[name].digits}f}"] for name, value in self.metrics().items()
        ]
        return [["", "value"], *figures]

    def _caption(self) -> str:
        trained, dropped = sum(row.trained_tokens for row in self.rows), sum(map(len, self.dropped.values()))
        answers = f", {len(self.answers)} answered" if self.answers else ""
        steps = sum(len(row.steps) for row in self.rows)
        answers += f", {steps} steps with tools" if steps else ""
        return f"{len(self.rows)} rows, {trained:,} trained tokens{answers}" + (
            f"; {dropped} rows not measured: {'; '.join(self.dropped)}" if dropped else ""
        )

    def __repr__(self) -> str:  # a notebook keeps it beside the HTML: the table, not every row with its answer
        return as_text(self._caption(), self._table())

    def _repr_html_(self) -> str:
        return as_html(self._caption(), self._table())


@dataclass(frozen=True)
class Change:
    """One figure before and after. `low` and `high` bound the confidence interval of after - before; None with few rows."""

    before: float
    after: float
    low: float | None
    high: float | None

    @property
    def difference(self) -> float:
        """after - before."""
        return self.after - self.before

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True, repr=False)
class Comparison:
    """Two evaluations of the same rows, figure by figure."""

    changes: dict[str, Change]
    caption: str
    confidence: float

    def __getitem__(self, metric: str) -> Change:
        """The change of a figure, such as `comparison["loss"].difference`.

        Raises:
            InputError: no such figure, or it was not measured.
        """
        return _find(self.changes, metric)

    def significant(self, metric: str) -> bool:
        """Whether a figure changed by more than its confidence interval is wide around 0: the interval leaves out 0."""
        return self[metric].significant

    def as_dict(self) -> dict[str, Any]:
        """All changes as plain data."""
        return {
            name: asdict(change) | {"difference": change.difference, "significant": change.significant}
            for name, change in self.changes.items()
        }

    def _table(self) -> list[list[str]]:
        lines = [["", "before", "after", "change", f"{self.confidence:.0%} interval", ""]]
        for name, change in self.changes.items():
            digits = METRICS[name].digits
            values = [
                f"{change.before:,.{digits}f}",
                f"{change.after:,.{digits}f}",
                f"{change.difference:+,.{digits}f}",
            ]
            if change.low is None or change.high is None:
                interval = f"fewer than {LEAST_ROWS} rows"
            else:
                interval = f"{change.low:+,.{digits}f} to {change.high:+,.{digits}f}"
            lines.append([METRICS[name].label, *values, interval, _verdict(name, change)])
        return lines

    def __repr__(self) -> str:
        return as_text(self.caption, self._table())

    def _repr_html_(self) -> str:
        return as_html(self.caption, self._table())


def compare(
    before: Evaluation, after: Evaluation, *, draws: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Comparison:
    """Compare two evaluations of the same rows, with paired bootstrap intervals (Efron 1979; Koehn 2004 for paired scores).

    Rows are drawn with replacement, the same ones for both sides, and each figure's change is computed anew; the interval is
    that between the percentiles of all `draws`. So it speaks of other rows like these, and not of another training.

    What only one side measured is left out: where one of the two answered nothing, losses alone are compared.

    Losses a token can be compared only where both models cut the rows into the same tokens; else loss and perplexity are left
    out, and the caption says so.

    Raises:
        InputError: the two are not of the same rows.
    """
    answered = [[(answer.question, answer.reference) for answer in side.answers] for side in (before, after)]
    taken = [[step.expected for row in side.rows for step in row.steps] for side in (before, after)]
    differ = any(all(sides) and sides[0] != sides[1] for sides in (answered, taken))
    if [row.row for row in before.rows] != [row.row for row in after.rows] or differ:
        raise InputError(
            f"before ({before._caption()}) and after ({after._caption()}) are not of the same rows: evaluate both on the same ones"
        )
    same_tokens = [row.trained_tokens for row in before.rows] == [row.trained_tokens for row in after.rows]
    generator = np.random.default_rng(seed)
    changes = {}
    for name, metric in METRICS.items():
        first, second = _parts(metric, before.rows), _parts(metric, after.rows)
        if not len(first) or not len(second) or (metric.parts is _loss and not same_tokens):
            continue
        sides = [metric.shown(parts[:, 0].sum() / parts[:, 1].sum()) for parts in (first, second)]
        low = high = None
        if len(first) >= LEAST_ROWS:
            drawn = generator.integers(len(first), size=(draws, len(first)))
            resampled = [_resampled(metric, parts, drawn) for parts in (first, second)]
            low, high = _middle(resampled[1] - resampled[0], confidence)
        changes[name] = Change(float(sides[0]), float(sides[1]), low, high)
    caption = after._caption()
    if not same_tokens:
        caption += "; the two cut rows into different tokens, so their losses cannot be compared"
    return Comparison(changes, caption, confidence)


def interval(
    evaluation: Evaluation, name: str, *, draws: int = 2000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float] | None:
    """Between which values a figure lies for other rows like these, by the bootstrap over rows; None with few rows.

    Raises:
        InputError: no such figure, or no row has a part in it.
    """
    metric = _find(METRICS, name)
    parts = _parts(metric, evaluation.rows)
    if len(parts) < LEAST_ROWS:
        return None
    drawn = np.random.default_rng(seed).integers(len(parts), size=(draws, len(parts)))
    return _middle(_resampled(metric, parts, drawn), confidence)


def _resampled(metric: _Metric, parts: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    return metric.shown(parts[drawn, 0].sum(axis=1) / parts[drawn, 1].sum(axis=1))


def _middle(values: np.ndarray, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = map(float, np.quantile(values, (tail, 1 - tail)))
    return low, high


def _parts(metric: _Metric, rows: Sequence[RowResult]) -> np.ndarray:
    """Numerators and denominators of the rows that have a part in a metric: float64, shape (rows, 2)."""
    return np.array([parts for row in rows if (parts := metric.parts(row)) is not None], dtype=np.float64).reshape(
        -1, 2
    )


def _find(figures: dict[str, Any], metric: str) -> Any:
    if metric not in figures:
        raise InputError(
            f"figure {metric!r} was not measured; there are {', '.join(figures)}{did_you_mean(metric, figures)}"
        )
    return figures[metric]


def _verdict(name: str, change: Change) -> str:
    if change.low is None:
        return ""
    if not change.significant:
        return "no clear change"
    up = change.difference > 0
    return {0: "more" if up else "fewer", 1: "better" if up else "worse", -1: "worse" if up else "better"}[
        METRICS[name].better
    ]
