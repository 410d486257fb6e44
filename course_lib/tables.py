"""Small tables of figures, as text for a terminal and as HTML for a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def as_text(caption: str, lines: Sequence[Sequence[str]]) -> str:
    """The first column to the left, figures to the right, and words behind them to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [caption]
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:5], widths[1:5], strict=True)]
        text.append("  ".join([*cells, *line[5:]]).rstrip())
    return "\n".join(text)


def as_html(caption: str, lines: Sequence[Sequence[str]]) -> str:
    """The same as an HTML table; the first line and the first column are headers."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in lines[0])
    body = "".join(
        f'<tr><th scope="row" style="text-align: left">{escape(line[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in line[1:])
        + "</tr>"
        for line in lines[1:]
    )
    return (
        f'<table><caption style="text-align: left">{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
