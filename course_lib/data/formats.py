"""Rows of every supported format, turned into `Conversation`.

`FORMATS` names them; the converters stand in `formats_*.py` by subject, the readers of files in `readers.py`. The way of a
row: `iter_rows(path)` -> `assemble_rows` (flat OASST messages become trees) -> `to_conversation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from course_lib.data.conversation import Conversation, RowError, json_type, shown
from course_lib.data.formats_chat import from_messages, from_sharegpt
from course_lib.data.formats_fields import Row, key_names
from course_lib.data.formats_instruction import (
    from_alpaca,
    from_alpaca_zh,
    from_medqa,
    from_prompt_completion,
    from_xtuner,
)
from course_lib.data.formats_msagent import from_msagent, is_msagent
from course_lib.data.formats_oasst import assemble_trees, from_oasst
from course_lib.data.formats_text import from_guanaco, from_text, has_turn_marks
from course_lib.data.readers import iter_rows as iter_rows
from course_lib.data.readers import read_rows as read_rows
from course_lib.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Format:
    """A format: the keys that give it away, its converter, and one line about it.

    `keys` are alternatives; a row fits when it has all keys of one of them, and `fits`, where there is one, agrees.
    """

    keys: tuple[tuple[str, ...], ...]
    convert: Callable[[Row, list[str]], Conversation]
    description: str
    fits: Callable[[Row], bool] = lambda row: True

    def has_keys(self, row: Row) -> bool:
        """Whether a row has the keys of this format."""
        return any(all(key in row for key in alternative) for alternative in self.keys)


# In the order they are tried: a row may have the keys of several (tatsu-lab/alpaca has `text` beside `instruction`).
FORMATS: dict[str, Format] = {
    "messages": Format((("messages",),), from_messages, "OpenAI / Hugging Face messages, with tools"),
    "msagent": Format(
        (("conversations",),), from_msagent, "MSAgent-Bench turns, calls and results marked in the text", is_msagent
    ),
    "sharegpt": Format((("conversations",),), from_sharegpt, "ShareGPT turns of from and value, with tools"),
    "xtuner": Format((("conversation",),), from_xtuner, "XTuner turns of input and output"),
    "alpaca": Format((("instruction",), ("instruction_zh",)), from_alpaca, "Alpaca instruction, input and output"),
    "alpaca_zh": Format((("instruction_zh",),), from_alpaca_zh, "the Chinese side of a bilingual Alpaca row"),
    "oasst": Format(
        (("message_tree_id", "prompt"), ("message_id", "text", "role")), from_oasst, "OpenAssistant trees, best path"
    ),
    "prompt_completion": Format((("prompt", "completion"),), from_prompt_completion, "a prompt and its completion"),
    "medqa": Format((("Question", "Answer"),), from_medqa, "a sheet with the columns Question and Answer"),
    "guanaco": Format((("text",),), from_guanaco, "text with ### Human: and ### Assistant: marks", has_turn_marks),
    "text": Format((("text",),), from_text, "plain text for continued pre-training, all of it trained"),
}


def detect_format(row: Any) -> str:
    """Name the format of a row by its keys; a `text` with `### Human:` marks is guanaco, without them plain text.

    Raises:
        RowError: no known format has these keys.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"row is {json_type(row)}, not an object: {shown(row)}")
    for name, row_format in FORMATS.items():
        if row_format.has_keys(row) and row_format.fits(row):
            return name
    wanted = ", ".join(f"{' + '.join(row_format.keys[0])} ({name})" for name, row_format in FORMATS.items())
    raise RowError(f"no known format has the keys {key_names(row)}; expected one of {wanted}")


def check_format_name(row_format: str) -> None:
    """Check the name given as `--format` or `data.format`.

    Raises:
        InputError: it is neither "auto" nor a known format.
    """
    if row_format != "auto" and row_format not in FORMATS:
        known = ", ".join(f"{name} ({known.description})" for name, known in FORMATS.items())
        raise InputError(
            f"format {shown(row_format)} is unknown: choose auto, {known}{did_you_mean(row_format, FORMATS)}"
        )


def assemble_rows(rows: Iterable[tuple[int, Any]], *, row_format: str = "auto") -> Iterator[tuple[int, Any]]:
    """The step between a file and its rows for formats where one conversation stands in many rows: flat OASST messages.

    Numbered rows of any other format pass through as they come.
    """
    return assemble_trees(rows) if row_format in ("auto", "oasst") else iter(rows)


def converted_rows(
    rows: Iterable[tuple[int, Any]], *, row_format: str = "auto"
) -> Iterator[tuple[int, Any, Conversation | RowError, list[str]]]:
    """Take the numbered rows of a file to conversations: (number, row, conversation or why it is none, notes)."""
    for number, row in assemble_rows(rows, row_format=row_format):
        notes: list[str] = []
        try:
            outcome: Conversation | RowError = to_conversation(row, row_format=row_format, notes=notes)
        except RowError as reason:
            outcome = reason
        yield number, row, outcome, notes


def to_conversation(row: Any, *, row_format: str = "auto", notes: list[str] | None = None) -> Conversation:
    """Turn one row into a conversation.

    Args:
        row: a row of a file, in any format of `FORMATS`.
        row_format: its format, or "auto" to tell by the keys.
        notes: gets a sentence for everything a format's rule left off or read in its own way, such as the unanswered last
            turn of a guanaco row. The same rule gives the same sentence, so notes can be counted.

    Raises:
        RowError: the row does not fit its format.
        InputError: `row_format` names no format.
    """
    check_format_name(row_format)
    if row_format == "auto":
        row_format = detect_format(row)
    chosen = FORMATS[row_format]
    if not isinstance(row, Mapping) or not chosen.has_keys(row):
        missing = [key for key in chosen.keys[0] if not isinstance(row, Mapping) or key not in row]
        raise RowError(f"has no {' and no '.join(map(repr, missing))}, which format {row_format} needs")
    return chosen.convert(row, [] if notes is None else notes)
