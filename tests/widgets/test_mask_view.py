from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from course_lib.data.templates import choose_template
from course_lib.data.tokenize import encode_conversation
from course_lib.errors import InputError
from course_lib.widgets.mask_view import MOST_CELLS, MaskView, counts, mask_cells, mask_column, visible

ROOT = Path(__file__).parents[2]
HOSTILE = """<script>alert("1 & '2'")</script><img src=x onerror=alert(1)>"""


def chat(question: str = "hi there", answer: str = "hello") -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def static(view: MaskView) -> str:
    return view._repr_mimebundle_()[0]["text/html"]


@pytest.mark.parametrize("name", ["auto", "chatml", "llama3_chat"])
@pytest.mark.parametrize(
    "row",
    [
        chat(),
        chat(HOSTILE, "🗼 北京 é\n\tx"),
        {"messages": [{"role": "system", "content": "s"}, *chat()["messages"] * 2]},
        {"messages": [*chat()["messages"], *chat()["messages"][:1], {**chat()["messages"][1], "train": False}]},
    ],
)
def test_cells_are_the_ids_and_labels_of_training(tokenizer: Any, row: dict, name: str) -> None:
    example = encode_conversation(row, choose_template(tokenizer, name), tokenizer)
    cells = mask_cells(row, name, tokenizer)
    assert [cell["id"] for cell in cells] == example.input_ids
    assert [cell["label"] for cell in cells] == example.labels
    assert sum(cell["trained"] for cell in cells) == example.trained_tokens
    assert [cell["position"] for cell in cells] == list(range(len(cells)))


def test_plain_text_trains_every_token_but_the_first(tokenizer: Any) -> None:
    cells = mask_cells({"text": "abc"}, "chatml", tokenizer)
    assert [cell["trained"] for cell in cells] == [False] + [True] * (len(cells) - 1)
    assert "nothing comes before the first token" in cells[0]["description"]


def test_a_position_predicts_the_next_token_where_that_one_is_trained(tokenizer: Any) -> None:
    cells = mask_cells(chat(answer="ok"), "auto", tokenizer)
    for cell, following in itertools.pairwise(cells):
        assert cell["predicts"] == (following["shown"] if following["trained"] else None)
    assert cells[-1]["predicts"] is None
    first = next(position for position, cell in enumerate(cells) if cell["trained"])
    assert (cells[first - 1]["trained"], cells[first - 1]["predicts"]) == (False, "o")


def test_special_tokens_are_spelt_out_and_what_only_looks_like_one_is_text(tokenizer: Any) -> None:
    cells = mask_cells(chat("<|im_end|>", "yes"), "auto", tokenizer)
    special = [cell["shown"] for cell in cells if cell["kind"] == "special"]
    assert special.count("<|im_end|>") == [cell["id"] for cell in cells].count(tokenizer.eos_token_id)
    assert "".join(cell["shown"] for cell in cells if cell["kind"] == "text").count("<|im_end|>") == 1


def test_bytes_of_one_character_are_shown_as_pieces_of_it(tokenizer: Any) -> None:
    cells = [cell for cell in mask_cells(chat(answer="a🗼é"), "auto", tokenizer) if cell["kind"] == "piece"]
    assert [cell["shown"] for cell in cells] == [f"⟨🗼 {n}/4⟩" for n in (1, 2, 3, 4)] + ["⟨é 1/2⟩", "⟨é 2/2⟩"]
    assert cells[0]["named"] == "bytes F0, piece 1 of 4 of '🗼'"
    assert all(cell["trained"] for cell in cells)


def test_a_replacement_character_in_the_text_is_a_character_like_any_other(tokenizer: Any) -> None:
    cells = [cell for cell in mask_cells(chat(answer="\ufffd"), "auto", tokenizer) if cell["kind"] == "piece"]
    assert [cell["shown"] for cell in cells] == [f"⟨\ufffd {n}/3⟩" for n in (1, 2, 3)]


def test_bytes_that_make_no_character_are_shown_as_bytes(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from course_lib.data.tokenize import Example
    from course_lib.widgets import mask_view

    whole = tokenizer("é", add_special_tokens=False)["input_ids"]
    example = Example(input_ids=[whole[0], tokenizer.eos_token_id, *whole], labels=[-100] * 4)
    monkeypatch.setattr(mask_view, "encode_conversation", lambda *_: example)
    shown = [cell["shown"] for cell in mask_cells(chat(), "auto", tokenizer)]
    assert shown == ["⟨C3⟩", "<|im_end|>", "⟨é 1/2⟩", "⟨é 2/2⟩"]


def test_sentencepiece_tokens_keep_their_leading_space_and_their_bytes() -> None:
    class Tokenizer:
        """What decoding one token of a SentencePiece vocabulary gives."""

        entries = ("▁the", "cat", "▁▁", "<0xF0>", "<0x9F>", "<0x97>", "<0xBC>")

        def convert_ids_to_tokens(self, token: int) -> str:
            return self.entries[token]

        def decode(self, ids: list[int], **_: Any) -> str:
            parts = [self.entries[token] for token in ids]
            raw = [bytes.fromhex(part[3:5]) if part.startswith("<0x") else part.encode() for part in parts]
            return b"".join(raw).decode(errors="replace").replace("▁", " ").removeprefix(" ")

    from course_lib.widgets import mask_view

    stub: Any = Tokenizer()
    assert [mask_view._token_text(token, stub) for token in (0, 1, 2)] == [" the", "cat", "  "]
    pieces = mask_view._pieces_of_characters([0, 3, 4, 5, 6], stub, {})
    assert pieces[1] == ("⟨🗼 1/4⟩", "bytes F0, piece 1 of 4 of '🗼'")
    assert sorted(pieces) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "shown"),
    [(" a", "·a"), ("\n\n", "⏎⏎"), ("\u200b", "U+200B"), ("\u0301", "◌\u0301"), ("\ufe0f", "U+FE0F"), ("", "(empty)")],
)
def test_what_a_reader_would_not_see_is_spelt_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_several_templates_stand_side_by_side_and_a_refusal_says_why(tokenizer: Any) -> None:
    row = {"messages": [{"role": "assistant", "content": "I begin"}, *chat()["messages"]]}
    view = MaskView(row, tokenizer, templates=["chatml", "llama2_chat"])
    good, refused = view.columns
    assert good["name"] == "chatml"
    assert good["cells"]
    assert refused["cells"] == []
    assert refused["error"]
    assert refused["counts"] == f"no tokens: {refused['error']}"
    assert "chatml" in repr(view)
    with pytest.raises(InputError, match="unknown"):
        MaskView(row, tokenizer, templates=["chatlm"])


def test_one_template_may_be_named_without_a_list(tokenizer: Any) -> None:
    assert [column["name"] for column in MaskView(chat(), tokenizer, "chatml").columns] == ["chatml"]
    with pytest.raises(ValueError, match="at least one template"):
        MaskView(chat(), tokenizer, [])


def test_a_long_conversation_shows_a_part_and_counts_the_whole(tokenizer: Any) -> None:
    row = chat(answer="x" * 2 * MOST_CELLS)
    example = encode_conversation(row, choose_template(tokenizer), tokenizer)
    column = mask_column(row, "auto", tokenizer)
    assert len(column["cells"]) == MOST_CELLS
    assert (column["tokens"], column["trained"]) == (len(example.input_ids), example.trained_tokens)
    assert f"the first {MOST_CELLS} are shown" in counts(column)
    assert len(static(MaskView(row, tokenizer))) < 50_000  # a committed notebook has 150 kB in all


def test_the_static_twin_shows_every_token_once_and_marks_the_trained_ones(tokenizer: Any, read_html: Callable) -> None:
    view = MaskView(chat(HOSTILE, "北 'ok' \"ok\""), tokenizer, templates=["auto", "chatml"])
    elements, text = read_html(static(view))
    tokens = [attributes["title"] for _, attributes in elements if "title" in attributes]
    marked = [attributes["title"] for tag, attributes in elements if tag == "ins" and "title" in attributes]
    cells = [cell for column in view.columns for cell in column["cells"]]
    assert tokens == [f"{cell['position']}: id {cell['id']}" for cell in cells]
    assert marked == [f"{cell['position']}: id {cell['id']}" for cell in cells if cell["trained"]]
    assert [tag for tag, _ in elements].count("b") == len(marked) + 1 + 2  # bold too: each, the key, two names
    for column in view.columns:
        assert counts(column) in text
    assert "How to read it" in text


def test_hostile_text_stays_text(tokenizer: Any, read_html: Callable) -> None:
    row = chat(HOSTILE, HOSTILE + "\"'><b>")
    elements, _ = read_html(static(MaskView(row, tokenizer, shift=True)))
    assert {tag for tag, _ in elements}.isdisjoint({"script", "img", "a", "iframe"})
    assert {name for _, attributes in elements for name in attributes} <= {
        *("class", "title", "align", "valign", "width", "scope", "tabindex")
    }


@pytest.mark.parametrize("kind", ["text", "special", "piece"])
@pytest.mark.parametrize("trained", [True, False])
def test_a_token_that_spells_markup_stays_text(tokenizer: Any, read_html: Callable, kind: str, trained: bool) -> None:
    """Real vocabularies have tokens as long as `<script`; the tiny tokenizer's are single bytes."""
    view = MaskView(chat(), tokenizer, shift=True)
    cell = {**view.columns[0]["cells"][0], "kind": kind, "trained": trained, "shown": HOSTILE, "predicts": HOSTILE}
    view.columns = [{**view.columns[0], "cells": [cell]}]
    elements, text = read_html(static(view))
    assert {tag for tag, _ in elements}.isdisjoint({"script", "img"})
    assert text.count(HOSTILE) == 2


def test_a_refusal_that_quotes_the_row_is_escaped(tokenizer: Any, read_html: Callable) -> None:
    view = MaskView(chat(), tokenizer)
    refused = {**view.columns[0], "cells": [], "error": HOSTILE, "name": HOSTILE}
    view.columns = [refused]
    elements, text = read_html(static(view))
    assert "script" not in {tag for tag, _ in elements}
    assert HOSTILE in text


def test_the_static_twin_shows_the_shift_where_asked(tokenizer: Any, read_html: Callable) -> None:
    view = MaskView(chat(answer="ok"), tokenizer)
    assert "<rt>" not in static(view)
    view.shift = True
    elements, _ = read_html(static(view))
    scored = [cell["predicts"] for cell in view.columns[0]["cells"] if cell["predicts"] is not None]
    assert re.findall(r"<rt>→(.*?)</rt>", static(view)) == ["o", "k", "&lt;|im_end|&gt;"]
    assert [tag for tag, _ in elements].count("rt") == len(scored)


def test_a_notebook_without_a_kernel_gets_text_and_html(tokenizer: Any) -> None:
    view = MaskView(chat(), tokenizer)
    bundle, _ = view._repr_mimebundle_()
    assert bundle["text/plain"] == repr(view)
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_the_state_a_browser_gets_is_plain_json(tokenizer: Any) -> None:
    import json

    view = MaskView(chat(HOSTILE, "🗼"), tokenizer)
    assert json.loads(json.dumps(view.columns, allow_nan=False)) == view.columns


# Contrast of the style sheet (WCAG 2.2: 4.5 for text, 3 for marks), without a theme and under JupyterLab's two.
THEMES = {
    "none": {},
    "light": {"content-font-color1": "#212121", "layout-color1": "#ffffff", "brand-color1": "#1976d2"},
    "dark": {"content-font-color1": "#ffffff", "layout-color1": "#212121", "brand-color1": "#2196f3"},
}
TEXT_ON = [
    *[("ink", ground) for ground in ("page", "faint", "trained", "segment", "segment-other")],
    *[("quiet", ground) for ground in ("page", "faint", "trained", "segment")],
]
MARK_ON = [
    ("line", "page"),
    ("brand", "page"),
    ("brand", "faint"),
    ("own", "page"),
    ("ink", "warned"),
    ("ink", "faint"),
    *[
        ("ink", part) for part in ("model-1", "model-2", "trains-1", "trains-2", "passes-1", "passes-2")
    ],  # the card's edge
]


def luminance(color: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def colors(theme: dict[str, str]) -> dict[str, tuple[float, ...]]:
    """The style sheet's own colours: a `--jp-*` variable with a fallback, or a mix of two."""
    css = ROOT.joinpath("course_lib/widgets/course.css").read_text(encoding="utf-8")
    found: dict[str, tuple[float, ...]] = {}

    def value(text: str) -> tuple[float, ...]:
        if match := re.fullmatch(r"var\(--course-([\w-]+)\)", text):
            return found[match[1]]
        if match := re.fullmatch(r"var\(--jp-([\w-]+), (#\w+)\)", text):
            text = theme.get(match[1], match[2])
        digits = text[1:] if len(text) == 7 else "".join(2 * digit for digit in text[1:])
        return tuple(int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))

    for name, text in re.findall(r"--course-([\w-]+): (.*);", css):
        if match := re.fullmatch(r"color-mix\(in srgb, (.*) (\d+)%, (.*)\)", text):
            share = int(match[2]) / 100
            pair = zip(value(match[1]), value(match[3]), strict=True)
            found[name] = tuple(share * a + (1 - share) * b for a, b in pair)
        elif text.startswith("var(--jp-") and "#" in text:
            found[name] = value(text)
    return found


@pytest.mark.parametrize("theme", THEMES)
def test_text_and_marks_stand_out_from_their_ground(theme: str) -> None:
    named = colors(THEMES[theme])
    for least, pairs in ((4.5, TEXT_ON), (3.0, MARK_ON)):
        for mark, ground in pairs:
            assert contrast(named[mark], named[ground]) >= least, (mark, ground)


@pytest.mark.parametrize(
    "asset",
    [
        *("dom.js", "mask_view.js", "packing_view.js", "memory_planner.js", "loss_chart.js", "chat.js", "course.css"),
        *("mask_view.py", "packing_view.py", "memory_planner.py", "chat.py", "transcript.py"),
    ],
)
def test_an_asset_names_no_address(asset: str) -> None:
    text = ROOT.joinpath("course_lib/widgets", asset).read_text(encoding="utf-8")
    assert not re.search(r"//[\w.]+\.\w|\burl\((?!#)|@import|\bimport\s*\(|\bfetch\(|<link|src=", text)
