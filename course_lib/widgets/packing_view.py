"""Packing as a picture: which samples share a row, what room is left, and what each token may look at."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import traitlets

from course_lib.data.packing import PackingStrategy, PackPlan, Piece, plan_packs
from course_lib.widgets.base import CourseWidget, script

MOST_PACKS = 24  # bars drawn a strategy
MOST_CELLS = 48  # rows and columns of the attention picture
_NARROWEST = 1 / 150  # of a bar: samples narrower than this are drawn together
_TEXT_WIDTH, _TEXT_PACKS, _TEXT_CELLS = 56, 8, 16  # of the static twin

OWN, FOREIGN, UNSEEN = "own", "foreign", "unseen"


class Segment(TypedDict):
    """A stretch of a bar: one sample, or `samples` narrow ones together. A cut sample is marked at the side it is cut."""

    label: str
    length: int
    samples: int
    begins_earlier: bool
    goes_on: bool


class PackRow(TypedDict):
    """One bar. `sample_at` is the sample that each cell of the attention picture falls into."""

    number: int
    tokens: int
    segments: list[Segment]
    sample_at: list[int]
    foreign_share: float  # of the pairs (token, earlier token or itself) that attention sees
    sentence: str


class PackingRows(TypedDict):
    """One strategy: the first bars, how many more there are, and the plan's report."""

    strategy: str
    isolated: bool
    max_length: int
    packs: list[PackRow]
    packs_left_out: int
    numbers: dict[str, float]


def packing_rows(
    lengths: Sequence[int] | np.ndarray,
    *,
    max_length: int,
    strategy: PackingStrategy,
    seed: int = 0,
    most: int = MOST_PACKS,
) -> PackingRows:
    """Plan the packs and describe the first `most` of them.

    Args:
        lengths: tokens of each sample; a sample's number is its index here, from 0.

    Raises:
        ValueError: a sample has no tokens, or (unless `concat`) more than `max_length`.
    """
    plan = plan_packs(lengths, max_length=max_length, strategy=strategy, seed=seed)
    report = plan.report()
    return PackingRows(
        strategy=strategy,
        isolated=plan.isolated,
        max_length=max_length,
        packs=[_pack_row(plan, number) for number in range(min(most, len(plan)))],
        packs_left_out=max(0, len(plan) - most),
        numbers={
            "packs": report.packs,
            "fill_share": report.fill_share,
            "padding_saved": report.padding_saved,
            "samples_cut": report.samples_cut,
            "tokens_cut_off": report.tokens_cut_off,
            "tokens_lost": report.tokens_lost,
        },
    )


def shown_numbers(numbers: dict[str, float]) -> list[tuple[str, str]]:
    """The numbers of a strategy as (name, text), in the order they are shown."""
    return [
        ("packs", f"{numbers['packs']:,}"),
        ("fill", f"{100 * numbers['fill_share']:.1f} %"),
        ("padding tokens saved", f"{numbers['padding_saved']:,}"),
        ("samples cut", f"{numbers['samples_cut']:,}"),
        ("tokens cut off from their beginning", f"{numbers['tokens_cut_off']:,}"),
        ("tokens lost", f"{numbers['tokens_lost']:,}"),
    ]


def _pack_row(plan: PackPlan, number: int) -> PackRow:
    pieces = plan[number]
    tokens = sum(piece.length for piece in pieces)
    share = 0.0 if plan.isolated else foreign_share(pieces)
    return PackRow(
        number=number,
        tokens=tokens,
        segments=_segments(pieces, plan),
        sample_at=sample_at_cells(pieces),
        foreign_share=share,
        sentence=_sentence(pieces, plan, share),
    )


def _segments(pieces: Sequence[Piece], plan: PackPlan) -> list[Segment]:
    narrowest = plan.max_length * _NARROWEST
    segments: list[Segment] = []
    for piece in pieces:
        begins_earlier = piece.start > 0
        goes_on = piece.start + piece.length < plan.lengths[piece.example]
        if segments and piece.length < narrowest and segments[-1]["length"] < narrowest:
            last = segments[-1]
            last["samples"] += 1
            last["length"] += piece.length
            last["label"] = f"{last['samples']} samples"
            last["goes_on"] = goes_on
        else:
            segments.append(
                Segment(
                    label=str(piece.example),
                    length=piece.length,
                    samples=1,
                    begins_earlier=begins_earlier,
                    goes_on=bool(goes_on),
                )
            )
    return segments


def sample_at_cells(pieces: Sequence[Piece], *, most: int = MOST_CELLS) -> list[int]:
    """Sample the tokens of a pack at even distances: the example number at each of at most `most` places."""
    edges = np.cumsum([piece.length for piece in pieces])
    cells = min(most, int(edges[-1]))
    middles = ((np.arange(cells) + 0.5) * edges[-1] / cells).astype(np.int64)
    return [pieces[place].example for place in np.searchsorted(edges, middles, side="right").tolist()]


def attention_cells(sample_at: Sequence[int], *, isolated: bool) -> list[list[str]]:
    """The attention mask of a pack by cells: row = the token that looks, column = the token it looks at.

    Returns:
        rows of `own` (same sample, not later), `foreign` (another sample's token that it sees) and `unseen`.
    """
    return [
        [
            UNSEEN if column > row or (isolated and other != sample) else OWN if other == sample else FOREIGN
            for column, other in enumerate(sample_at)
        ]
        for row, sample in enumerate(sample_at)
    ]


def foreign_share(pieces: Sequence[Piece]) -> float:
    """Share of a full causal triangle's pairs that join two samples: 1 - (sum of the samples' own triangles / the whole)."""
    tokens = sum(piece.length for piece in pieces)
    own = sum(piece.length * (piece.length + 1) for piece in pieces)
    return 1 - own / (tokens * (tokens + 1)) if tokens else 0.0


def _sentence(pieces: Sequence[Piece], plan: PackPlan, share: float) -> str:
    first, last = pieces[0], pieces[-1]
    if len(pieces) == 1:
        text = "One sample: each token sees itself and the tokens before it."
    elif plan.isolated:
        text = f"{len(pieces)} samples, {len(pieces)} blocks: each token sees only its own sample, and positions restart at each."
    else:
        text = (
            f"One triangle over {len(pieces)} samples: {100 * share:.0f}\u00a0% of what the tokens see belongs to another sample. "
            "That is contamination: an answer is trained with unrelated text before it."
        )
    if first.start > 0:
        text += f" Sample {first.example} began in an earlier pack, {_tokens(first.start)} before this one."
    missing = int(plan.lengths[last.example]) - last.start - last.length
    if missing:
        text += f" Sample {last.example} is cut: {_tokens(missing)} of it lie in later packs."
    return text


def _tokens(count: int) -> str:
    return f"{count:,} token{'' if count == 1 else 's'}"


class PackingView(CourseWidget):
    """Show how samples of these lengths are packed, by each strategy in turn, and the attention mask of a chosen pack.

    Example:
        `PackingView([len(e.input_ids) for e in examples], max_length=512)` as the last line of a cell.

    Raises:
        ValueError: a sample has no tokens, or (unless `concat`) more than `max_length`; or no strategy is named.
    """

    _esm = script("packing_view.js")

    views = traitlets.List().tag(sync=True)  # of PackingRows, each with "shown", its numbers as text
    strategy = traitlets.Unicode().tag(sync=True)
    pack = traitlets.Int(0).tag(sync=True)  # whose attention mask is shown

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        max_length: int,
        strategies: Sequence[PackingStrategy] = ("none", "concat", "best-fit"),
        seed: int = 0,
    ) -> None:
        if not strategies:
            raise ValueError("name at least one packing strategy: none, concat or best-fit")
        made = [packing_rows(lengths, max_length=max_length, strategy=name, seed=seed) for name in strategies]
        self.samples, self.max_length = len(lengths), max_length
        super().__init__(
            views=[{**rows, "shown": shown_numbers(rows["numbers"])} for rows in made], strategy=strategies[0]
        )

    @traitlets.validate("strategy")
    def _known_strategy(self, proposal: dict[str, Any]) -> str:
        known = [rows["strategy"] for rows in self.views]
        if proposal["value"] not in known:
            raise traitlets.TraitError(f"strategy is {proposal['value']!r}; this view has {', '.join(known)}")
        return proposal["value"]

    def __repr__(self) -> str:
        plans = (
            f"{rows['strategy']} {rows['numbers']['packs']:,} packs, {100 * rows['numbers']['fill_share']:.1f} % full"
            for rows in self.views
        )
        return f"PackingView: {self.samples:,} samples, max_length {self.max_length:,}: " + "; ".join(plans)

    def twin(self) -> str:
        """The live widget, and for pages without a kernel all strategies one below the other, drawn in text."""
        return static_html(self.views)


def bar_text(row: PackRow, *, max_length: int, width: int = _TEXT_WIDTH) -> str:
    """A bar of `width` places between its ends: `│  3  │ 12 │░░░│`; `‹` and `›` stand where a sample is cut."""
    edges = np.cumsum([0, *(segment["length"] for segment in row["segments"])]) * width / max_length
    ends = np.round(edges).astype(int).tolist()
    text = "‹" if row["segments"][0]["begins_earlier"] else "│"
    for segment, start, end in zip(row["segments"], ends[:-1], ends[1:], strict=True):
        room = end - start
        label = segment["label"] if len(segment["label"]) < room else ""
        text += (f"{label:^{room - 1}}" + ("›" if segment["goes_on"] else "│")) if room else ""
    unused = width - ends[-1]
    return text + ("░" * (unused - 1) + "│" if unused else "")


def attention_text(row: PackRow, *, isolated: bool, cells: int = _TEXT_CELLS) -> str:
    """The attention picture in text, `cells` lines at most: ██ own sample, ▒▒ another sample, ·· not seen."""
    places = row["sample_at"]
    step = max(1, -(-len(places) // cells))
    marks = {OWN: "██", FOREIGN: "▒▒", UNSEEN: "··"}
    return "\n".join(
        "".join(marks[cell] for cell in line) for line in attention_cells(places[step // 2 :: step], isolated=isolated)
    )


# GitHub takes the style sheet and all classes away; text in <pre> stays, so bars and pictures are drawn with characters.
_STYLE = """<style>
.course-packing-twin table {border-collapse: collapse; margin: 8px 0; font-size: 13px}
.course-packing-twin tbody tr:nth-child(n) {background: none}
.course-packing-twin :is(td, th) {border: 0; padding: 3px 0 3px 24px; white-space: normal; text-align: right; font-weight: 400}
.course-packing-twin tr > :first-child {text-align: left; padding-left: 0}
.course-packing-twin thead th {font-weight: 700}
.course-packing-twin tbody > tr > * {border-top: 1px solid color-mix(in srgb, currentColor 25%, transparent)}
.course-packing-twin td {font-variant-numeric: tabular-nums}
.course-packing-twin pre {font-family: var(--jp-code-font-family, ui-monospace, Menlo, Consolas, monospace); font-size: 12px;
 line-height: 1.5; margin: 4px 0 14px; padding: 0; background: none; overflow-x: auto}
.course-packing-twin pre.course-picture {line-height: 1; color: var(--jp-brand-color1, #2b83d6)}
.course-packing-strategy {display: flex; flex-wrap: wrap; align-items: flex-start; gap: 4px 32px; margin: 4px 0 12px}
.course-packing-twin .course-packing-strategy > * {margin: 0; min-width: 0; max-width: 100%}
.course-packing-strategy > p {flex: 1 1 15rem}
</style>"""


def static_html(views: Sequence[PackingRows]) -> str:
    """All strategies as HTML without script: a table of their numbers, their first packs as bars, one attention mask each."""
    names = [name for name, _ in shown_numbers(views[0]["numbers"])]
    head = "".join(f'<th scope="col">{html.escape(rows["strategy"])}</th>' for rows in views)
    body = ""
    for line, name in enumerate(names):
        values = "".join(f"<td>{shown_numbers(rows['numbers'])[line][1]}</td>" for rows in views)
        body += f'<tr><th scope="row">{name}</th>{values}</tr>'
    key = (
        f"<p>A line is a pack of at most {_tokens(views[0]['max_length'])}: its samples by their number, behind it its tokens; ░ unused "
        "room, ‹ › a sample is cut. Beside it the attention mask of one pack: a line is the token that looks, a column the token it "
        "looks at; ██ its own sample, ▒▒ another sample, ·· not seen.</p>"
    )
    table = f'<table><thead><tr><th scope="col">packing</th>{head}</tr></thead><tbody>{body}</tbody></table>'
    strategies = "\n".join(_static_strategy(rows) for rows in views)
    return f'<div class="course-packing-twin">{_STYLE}\n{table}\n{key}\n{strategies}</div>'


def _static_strategy(rows: PackingRows) -> str:
    name = html.escape(rows["strategy"])
    shown = rows["packs"][:_TEXT_PACKS]
    if not shown:
        return f"<b>{name}</b><p>No samples.</p>"
    bars = [f"{row['number']:>4} {bar_text(row, max_length=rows['max_length'])} {row['tokens']:>6,}" for row in shown]
    more = int(rows["numbers"]["packs"]) - len(shown)
    if more:
        bars.append(f"     and {more:,} more pack{'' if more == 1 else 's'}")
    row = next((row for row in shown if len(row["segments"]) > 1), shown[0])
    picture = attention_text(row, isolated=rows["isolated"])
    return (
        f'<b>{name}</b>\n<div class="course-packing-strategy"><pre tabindex="0">{html.escape(chr(10).join(bars))}</pre>\n'
        f'<pre class="course-picture" role="img" aria-label="Attention mask, {name}, pack {row["number"]}">{picture}</pre>\n'
        f"<p><b>Attention in pack {row['number']}.</b> {html.escape(row['sentence'])}</p></div>"
    )
