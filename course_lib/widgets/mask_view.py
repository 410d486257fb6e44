"""A conversation as the model sees it, token by token, with the loss mask: what is trained, and what is context only."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TypedDict

import traitlets

from course_lib.data.conversation import Conversation, RowError
from course_lib.data.templates import ChatTemplate, choose_template
from course_lib.data.tokenize import IGNORE_INDEX, encode_conversation
from course_lib.widgets.base import CourseWidget, script

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_CELLS = 600  # tokens drawn a template; more make the page slow, and no reader looks at them
_MOST_PIECES = 8  # tokens tried to complete one character: it has at most four bytes, tokens may overlap two characters
_BROKEN = "\ufffd"  # what decoding gives for bytes that are no whole character


class MaskCell(TypedDict):
    """One token. `id` and `label` are as `encode_conversation` gives them.

    `trained` is whether the loss is counted at this token: its label is not -100, and a token before predicts it.
    `shown` is its text with spaces and line breaks made visible, `named` its text as Python writes it, or its bytes.
    `predicts` is the next token as shown, where that one is trained, else None: what this position is scored on.
    `description` is all of this as a sentence, for those who hear the page.
    """

    position: int
    id: int
    label: int
    trained: bool
    kind: str  # text | special | piece (bytes that are no whole character)
    shown: str
    named: str
    ends_line: bool
    predicts: str | None
    description: str


class MaskColumn(TypedDict):
    """The cells of one template. `tokens` and `trained` count the whole conversation; `error` says why there is none."""

    name: str
    tokens: int
    trained: int
    cells: list[MaskCell]
    error: str


def mask_cells(
    conversation: Conversation, template: ChatTemplate | str, tokenizer: PreTrainedTokenizerBase
) -> list[MaskCell]:
    """Tokenise a conversation as training does, and say for each token how to show it and whether it is trained.

    Args:
        template: a template, or its name (`auto`: the tokenizer's own).

    Raises:
        InputError: the template's name is unknown.
        RowError: the template refuses the conversation.
    """
    if isinstance(template, str):
        template = choose_template(tokenizer, template)
    example = encode_conversation(conversation, template, tokenizer)
    special = _spelt_out(tokenizer)
    pieces = _pieces_of_characters(example.input_ids, tokenizer, special)
    cells: list[MaskCell] = []
    for position, (token, label) in enumerate(zip(example.input_ids, example.labels, strict=True)):
        trained = label != IGNORE_INDEX and position > 0
        if token in special:
            kind, text, named = "special", special[token], repr(special[token])
            shown = visible(text)
        elif position in pieces:
            kind, text, (shown, named) = "piece", "", pieces[position]
        else:
            kind, text = "text", _token_text(token, tokenizer)
            shown, named = visible(text), repr(text)
        said = "trained" if trained else f"{label} (not trained)"
        if label != IGNORE_INDEX and not trained:
            said = "not trained (nothing comes before the first token to predict it)"
        cells.append(
            MaskCell(
                position=position,
                id=token,
                label=label,
                trained=trained,
                kind=kind,
                shown=shown,
                named=named,
                ends_line="\n" in text,
                predicts=None,
                description=f"token {position} {named}, id {token}, label: {said}",
            )
        )
    for cell, following in pairwise(cells):
        cell["predicts"] = following["shown"] if following["trained"] else None
    return cells


def visible(text: str) -> str:
    """Spell out what a reader would not see: a space as `·`, a line break as `⏎`, other invisible characters by their code."""
    marks = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
    return "".join(marks.get(character) or _visible_character(character) for character in text) or "(empty)"


def _visible_character(character: str) -> str:
    category = unicodedata.category(character)
    if category in {"Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"} or "VARIATION SELECTOR" in unicodedata.name(
        character, ""
    ):
        return f"U+{ord(character):04X}"
    return f"◌{character}" if category.startswith("M") else character  # a combining mark needs something to stand on


def _spelt_out(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Tokens that are markers, not text: special ones, and added ones that spell a name such as `<tool_call>`."""
    named = {token: text for text, token in tokenizer.get_added_vocab().items() if len(text) > 1 and text.strip()}
    return named | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def _decode(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _token_text(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of one token. SentencePiece drops the space a lone token begins with; its vocabulary has it as `▁`."""
    text, entry = _decode([token], tokenizer), tokenizer.convert_ids_to_tokens(token)
    spaces = len(entry) - len(entry.lstrip("▁"))
    return " " * spaces + text.lstrip(" ▁") if spaces else text


def _pieces_of_characters(
    ids: list[int], tokenizer: PreTrainedTokenizerBase, special: dict[int, str]
) -> dict[int, tuple[str, str]]:
    """Tokens that hold part of a character only: position -> (how it is shown, how it is named in words).

    `⟨好 1/2⟩` is the first of two tokens that make 好; `⟨E5 A5⟩` are bytes that no neighbour completes.
    """
    pieces: dict[int, tuple[str, str]] = {}
    for first, token in enumerate(ids):
        if first in pieces or token in special or _whole_text([token], tokenizer) is not None:
            continue
        text, parts = _completed(ids[first : first + _MOST_PIECES], tokenizer)
        for part in range(parts):
            raw = (_bytes_of(ids[first + part], tokenizer) or b"").hex(" ").upper()
            if text:
                words = f"{'bytes ' + raw + ', ' if raw else ''}piece {part + 1} of {parts} of {text!r}"
                pieces[first + part] = (f"⟨{visible(text)} {part + 1}/{parts}⟩", words)
            else:
                pieces[first] = (f"⟨{raw or _BROKEN}⟩", f"bytes {raw or 'unknown'}, no whole character")
    return pieces


def _completed(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """The shortest run of tokens from the first that makes whole characters: its text and length; ('', 1) if none."""
    for count in range(2, len(ids) + 1):
        text = _whole_text(ids[:count], tokenizer)
        if text is not None:
            return text, count
    return "", 1


def _whole_text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The text of these tokens, or None where their bytes begin or end inside a character.

    Decoding writes U+FFFD for such bytes; but a text may also contain that character itself, and its bytes tell.
    """
    text = _decode(ids, tokenizer)
    if _BROKEN not in text:
        return text
    parts = [_bytes_of(token, tokenizer) for token in ids]
    if None in parts:
        return None
    return text if b"".join(part for part in parts if part) == text.encode() else None


def _byte_alphabet() -> dict[str, int]:
    """The letter that GPT-2's byte-level vocabulary writes for each byte, reversed (openai/gpt-2, `encoder.py`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(rest)}


_BYTE_OF = _byte_alphabet()


def _bytes_of(token: int, tokenizer: PreTrainedTokenizerBase) -> bytes | None:
    """The bytes of a token, from its spelling in the vocabulary; None for a spelling in no known alphabet."""
    entry = tokenizer.convert_ids_to_tokens(token)
    if entry.startswith("<0x") and entry.endswith(">"):  # SentencePiece byte fallback
        return bytes.fromhex(entry[3:-1])
    return bytes(_BYTE_OF[letter] for letter in entry) if set(entry) <= set(_BYTE_OF) else None


def mask_column(
    conversation: Conversation, template_name: str, tokenizer: PreTrainedTokenizerBase, *, most: int = MOST_CELLS
) -> MaskColumn:
    """The cells of one template, at most `most` of them, and the counts of all; a refusal is kept as `error`.

    Raises:
        InputError: the template's name is unknown.
    """
    template = choose_template(tokenizer, template_name)
    name = template_name if template.name == template_name else f"{template_name}: {template.name}"
    try:
        cells = mask_cells(conversation, template, tokenizer)
    except RowError as error:
        return MaskColumn(name=name, tokens=0, trained=0, cells=[], error=str(error))
    trained = sum(cell["trained"] for cell in cells)
    return MaskColumn(name=name, tokens=len(cells), trained=trained, cells=cells[:most], error="")


def counts(column: MaskColumn) -> str:
    """`45 tokens, 12 trained (27 %)`, and how many are shown where that is not all."""
    if column["error"]:
        return f"no tokens: {column['error']}"
    share = column["trained"] / column["tokens"] if column["tokens"] else 0.0
    text = f"{column['tokens']:,} tokens, {column['trained']:,} trained ({100 * share:.0f} %)"
    shown = len(column["cells"])
    return text + (f"; the first {shown:,} are shown, the counts are of all" if shown < column["tokens"] else "")


class MaskView(CourseWidget):
    """Show which tokens of a conversation are trained, under one chat template or several side by side.

    Example:
        `MaskView(row, tokenizer, templates=["auto", "chatml"])` as the last line of a cell. `tokenizer` is a fast
        tokenizer of transformers. A template that refuses the conversation says why in its column.

    Raises:
        InputError: a template's name is unknown.
        ValueError: no template is named.
    """

    _esm = script("mask_view.js")

    columns = traitlets.List().tag(sync=True)  # of MaskColumn, each with "counts", the sentence above its tokens
    shift = traitlets.Bool(False).tag(sync=True)  # show under each token the one it predicts

    def __init__(
        self,
        conversation: Conversation,
        tokenizer: PreTrainedTokenizerBase,
        templates: Sequence[str] | str = ("auto",),
        *,
        shift: bool = False,
        most: int = MOST_CELLS,
    ) -> None:
        names = [templates] if isinstance(templates, str) else list(templates)
        if not names:
            raise ValueError("name at least one template, or auto for the tokenizer's own")
        made = [mask_column(conversation, name, tokenizer, most=most) for name in names]
        super().__init__(columns=[{**column, "counts": counts(column)} for column in made], shift=shift)

    def __repr__(self) -> str:
        return "MaskView: " + "; ".join(f"{column['name']}: {column['counts']}" for column in self.columns)

    def twin(self) -> str:
        """The live widget, and for pages without a kernel the same tokens as plain HTML."""
        return static_html(self.columns, shift=self.shift)


# GitHub takes the style sheet and all classes away: what is left, <ins> underlined, <b> bold and <kbd> boxed, must do. The
# shade lets the page shine through, so that it suits a light page and a dark one.
_STYLE = """<style>
.course-mask-twin table {border-collapse: collapse; margin: 8px 0; width: 100%; font-size: 13px}
.course-mask-twin tbody tr:nth-child(n) {background: none}
.course-mask-twin :is(td, th) {border: 0; padding: 4px 20px 4px 0; vertical-align: top; font-weight: 400; white-space: normal}
.course-mask-tokens {font-family: var(--jp-code-font-family, ui-monospace, Menlo, Consolas, monospace); line-height: 1.8;
 max-height: 26rem; overflow: auto; overflow-wrap: anywhere}
.course-mask-twin :is(p, div) :is(code, kbd, ins) {display: inline-block; max-width: 100%; box-sizing: border-box; font: inherit; color: inherit;
 line-height: 1.4; border: 1px solid transparent; border-radius: 4px; padding: 0 2px; box-shadow: none}
.course-mask-twin div code:nth-child(n) {background: color-mix(in srgb, currentColor 8%, transparent)}
.course-mask-twin :is(p, div) kbd:nth-child(n) {border-color: currentColor}
.course-mask-twin :is(p, div) ins:nth-child(n) {background: color-mix(in srgb, var(--jp-brand-color1, #1976d2) 28%, transparent);
 text-decoration: underline 2px; text-underline-offset: 3px}
.course-mask-twin kbd:has(ins) {padding: 0}
.course-mask-shift {line-height: 3.2}
.course-mask-twin rt {font-size: 0.85em; line-height: 1.3; opacity: 0.85}
.course-mask-twin ruby {ruby-position: under; margin: 0 2px}
@media print {.course-mask-tokens {max-height: none}}
</style>"""


def static_html(columns: Sequence[MaskColumn], *, shift: bool = False) -> str:
    """The shown tokens of all columns as HTML without script, every text of the conversation escaped.

    Args:
        shift: write beside each token the one it is scored on (as `<ruby>`: small, below it, or above it where styles are lost).
    """
    shifted = "; a small token after an arrow is what that position is scored on: the next token" if shift else ""
    key = (
        "<p>How to read it: <ins><b>bold and underlined</b></ins> is trained, plain is context only, <kbd>boxed</kbd> is a "
        f"special token; · is a space, ⏎ a line break, ⟨é 1/2⟩ a piece of a character{shifted}.</p>"
    )
    # notebook pages align what is in a table to the right, and heed no attribute of <td>: hence the <div align>
    heads = "".join(
        f'<th scope="col" width="{100 // len(columns)}%"><div align="left"><b>{html.escape(column["name"])}</b><br>'
        f"{html.escape(counts(column))}</div></th>"
        for column in columns
    )
    place = f'align="left" class="course-mask-tokens{" course-mask-shift" if shift else ""}" tabindex="0"'
    bodies = "".join(
        f'<td valign="top"><div {place}>{_static_tokens(column["cells"], shift)}</div></td>' for column in columns
    )
    table = f"<table><thead><tr>{heads}</tr></thead><tbody><tr>{bodies}</tr></tbody></table>"
    return f'<div class="course-mask-twin">{_STYLE}\n{key}\n{table}</div>'


def _static_tokens(cells: Sequence[MaskCell], shift: bool) -> str:
    tokens = []
    for cell in cells:
        where, text = f'title="{cell["position"]}: id {cell["id"]}"', html.escape(cell["shown"])
        if cell["trained"]:
            token = f"<ins {where}><b>{text}</b></ins>"
            token = f"<kbd>{token}</kbd>" if cell["kind"] == "special" else token
        else:
            tag = "kbd" if cell["kind"] == "special" else "code"
            token = f"<{tag} {where}>{text}</{tag}>"
        if shift and cell["predicts"] is not None:
            token = f"<ruby>{token}<rt>→{html.escape(cell['predicts'])}</rt></ruby>"
        tokens.append(token + ("<br>" if cell["ends_line"] else ""))
    return " ".join(tokens)
