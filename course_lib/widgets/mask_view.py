"""A conversation as the model sees it, token by token, with the loss mask: what is trained, and what is context only."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import anywidget
import traitlets

from course_lib.data.conversation import Conversation, RowError
from course_lib.data.templates import ChatTemplate, choose_template
from course_lib.data.tokenize import IGNORE_INDEX, encode_conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HERE = Path(__file__).parent
MOST_CELLS = 600  # tokens drawn a template; more make the page slow, and no reader looks at them
_MOST_PIECES = 8  # tokens tried to complete one character: it has at most four bytes, tokens may overlap two characters
_BROKEN = "\ufffd"  # what decoding gives for bytes that are no whole character


class MaskCell(TypedDict):
    """One token. `id` and `label` are as `encode_conversation` gives them.

    `trained` is whether the loss is counted at this token: its label is not -100, and a token before predicts it.
    `predicts` is the next token as shown, where that one is trained, else None: what this position is scored on.
    """

    position: int
    id: int
    label: int
    trained: bool
    kind: str  # text | special | piece (bytes that are no whole character)
    shown: str
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
        if first in pieces or token in special or _BROKEN not in _decode([token], tokenizer):
            continue
        text, parts = _completed(ids[first : first + _MOST_PIECES], tokenizer)
        for part in range(parts):
            raw = _bytes_of(ids[first + part], tokenizer)
            if text:
                words = f"{'bytes ' + raw + ', ' if raw else ''}piece {part + 1} of {parts} of {text!r}"
                pieces[first + part] = (f"⟨{visible(text)} {part + 1}/{parts}⟩", words)
            else:
                pieces[first] = (f"⟨{raw or _BROKEN}⟩", f"bytes {raw or 'unknown'}, no whole character")
    return pieces


def _completed(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """The shortest run of tokens from the first that decodes to whole characters: its text and length; ('', 1) if none."""
    for count in range(2, len(ids) + 1):
        text = _decode(ids[:count], tokenizer)
        if _BROKEN not in text:
            return text, count
    return "", 1


def _byte_alphabet() -> dict[str, int]:
    """The letter that GPT-2's byte-level vocabulary writes for each byte, reversed (openai/gpt-2, `encoder.py`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(rest)}


_BYTE_OF = _byte_alphabet()


def _bytes_of(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The bytes of a token in hexadecimal, from its spelling in the vocabulary; '' for an unknown spelling."""
    entry = tokenizer.convert_ids_to_tokens(token)
    if entry.startswith("<0x") and entry.endswith(">"):  # SentencePiece byte fallback
        return entry[3:-1]
    return " ".join(f"{_BYTE_OF[letter]:02X}" for letter in entry) if set(entry) <= set(_BYTE_OF) else ""


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


class MaskView(anywidget.AnyWidget):
    """Show which tokens of a conversation are trained, under one chat template or several side by side.

    Example:
        `MaskView(row, tokenizer, templates=["auto", "chatml"])` as the last line of a cell. `tokenizer` is a fast
        tokenizer of transformers. A template that refuses the conversation says why in its column.

    Raises:
        InputError: a template's name is unknown.
    """

    _esm = _HERE / "mask_view.js"
    _css = _HERE / "course.css"

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
        made = [mask_column(conversation, name, tokenizer, most=most) for name in names]
        super().__init__(columns=[{**column, "counts": counts(column)} for column in made], shift=shift)

    def __repr__(self) -> str:
        return "MaskView: " + "; ".join(f"{column['name']}: {column['counts']}" for column in self.columns)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The live widget, and for pages without a kernel the same tokens as plain HTML."""
        bundle = super()._repr_mimebundle_(**kwargs)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        data["text/plain"] = repr(self)
        data["text/html"] = static_html(self.columns)
        return bundle


# Inline styles only, with colours that suit a light page and a dark one; where a page strips even these, <ins> is still
# underlined, <b> bold and <kbd> boxed.
_BOX = 'style="border:1px solid;border-radius:3px;padding:2px 3px;background:none;color:inherit"'
_PIECE = 'style="border:1px dotted;padding:0 2px;background:none;color:inherit"'
_TRAINED = 'style="background:#2196f340"'


def static_html(columns: Sequence[MaskColumn]) -> str:
    """All tokens of all columns as HTML without script or style sheet, every text of the conversation escaped."""
    key = (
        f"<p>How to read it: <ins {_TRAINED}><b>bold and underlined</b></ins> is trained, plain is context only, "
        f"<kbd {_BOX}>boxed</kbd> is a special token; · is a space, ⏎ a line break, "
        f"<code {_PIECE}>⟨é 1/2⟩</code> a piece of a character.</p>"
    )
    parts = [key]
    for column in columns:
        parts.append(f"<p><b>{html.escape(column['name'])}</b>: {html.escape(counts(column))}</p>")
        if column["cells"]:
            parts.append(f"<p style='line-height:1.9'>{_static_tokens(column['cells'])}</p>")
    return "<div>" + "\n".join(parts) + "</div>"


def _static_tokens(cells: Sequence[MaskCell]) -> str:
    tokens = []
    for cell in cells:
        tag, style = {"special": ("kbd", f" {_BOX}"), "piece": ("code", f" {_PIECE}"), "text": ("code", "")}[
            cell["kind"]
        ]
        if cell["trained"] and cell["kind"] == "text":
            tag = "samp"  # a page's own background for <code> would hide the shade
        token = f'<{tag} title="{cell["position"]}: id {cell["id"]}"{style}>{html.escape(cell["shown"])}</{tag}>'
        if cell["trained"]:
            token = f"<ins {_TRAINED}><b>{token}</b></ins>"
        tokens.append(token + ("<br>" if cell["ends_line"] else ""))
    return " ".join(tokens)
