from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


@pytest.fixture
def read_html() -> Any:
    """Parse well-formed HTML: its elements as (tag, attributes), and its text without style sheets."""

    def read(text: str) -> tuple[list[tuple[str, dict[str, str | None]]], str]:
        reader = _Reader()
        reader.feed(text)
        reader.close()
        assert not reader.open, f"never closed: {reader.open}"
        return reader.elements, "".join(reader.text)

    return read
