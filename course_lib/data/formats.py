"""Rows of every supported file format, turned into `Conversation`.

| format | a row |
|---|---|
| messages | `{"messages": [{"role", "content"}, ...]}` (Hugging Face, OpenAI) |
| xtuner | `{"conversation": [{"system"?, "input", "output"}, ...]}` (XTuner 0.1.9) |
| alpaca | `{"instruction", "input"?, "output"}` (Stanford Alpaca) |
| guanaco | `{"text": "### Human: ...### Assistant: ..."}` (openassistant-guanaco) |

A file is a JSON array or JSON Lines, whatever its suffix: XTuner's tutorial writes an array into `.jsonl`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from course_lib.data.conversation import Conversation, Message, RowError, conversation
from course_lib.errors import InputError, did_you_mean
from course_lib.files import read_text

Row = Mapping[str, Any]


def read_rows(path: str | Path) -> list[Any]:
    """Read a JSON array, one JSON object, or JSON Lines.

    Raises:
        InputError: the file cannot be read, or holds broken JSON (line and column are named).
    """
    text = read_text(path)
    if text.lstrip()[0] == "[":
        rows = _parse(text, path, first_line=1)
        if not rows:
            raise InputError(f"{path}: is an empty list; it should hold at least one row")
        return rows
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    try:
        return [_parse(line, path, first_line=number) for number, line in lines]
    except InputError:
        try:  # a single object spread over several lines
            return [json.loads(text)]
        except (ValueError, RecursionError):
            pass
        raise


def _parse(text: str, path: str | Path, *, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(f"{path}: broken JSON at line {line}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise InputError(f"{path}: JSON nested too deeply in the value that starts at line {first_line}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(f"{path}: bad number in the value that starts at line {first_line}: {error}") from None


def from_messages(row: Row) -> Conversation:
    """`messages` rows pass through, checked; other keys of a message are left behind."""
    messages = row["messages"]
    if not isinstance(messages, list):
        raise RowError(f"messages is {type(messages).__name__}, not a list")
    kept = ("role", "content", "train")
    return conversation(
        [{key: turn[key] for key in kept if key in turn} if isinstance(turn, Mapping) else turn for turn in messages]
    )  # type: ignore[misc]


def from_xtuner(row: Row) -> Conversation:
    """XTuner's `conversation`: turns of input and output; the first turn may carry the system text."""
    turns = row["conversation"]
    if not isinstance(turns, list):
        raise RowError(f"conversation is {type(turns).__name__}, not a list of turns")
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise RowError(f"turn {number} is {type(turn).__name__}, not an object with input and output")
        system = _text(turn, "system", f"turn {number}", required=False)
        if system and not messages:
            messages.append({"role": "system", "content": system})
        messages.append({"role": "user", "content": _text(turn, "input", f"turn {number}")})
        messages.append({"role": "assistant", "content": _text(turn, "output", f"turn {number}")})
    return conversation(messages)


def from_alpaca(row: Row) -> Conversation:
    """Alpaca: the input, when there is one, follows the instruction after a blank line."""
    instruction = _text(row, "instruction", "row")
    extra = _text(row, "input", "row", required=False)
    prompt = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    system = _text(row, "system", "row", required=False)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    messages.append({"role": "assistant", "content": _text(row, "output", "row")})
    return conversation(messages)


_GUANACO_TURN = re.compile(r"### (Human|Assistant):")  # any other "### heading" is part of the answer


def from_guanaco(row: Row) -> Conversation:
    """openassistant-guanaco: one text with `### Human:` and `### Assistant:` before the turns.

    A last human turn that nobody answered carries nothing to learn and is left off.
    """
    text = _text(row, "text", "row")
    pieces = _GUANACO_TURN.split(text)
    if pieces[0].strip() or len(pieces) < 3:
        raise RowError("text does not begin with '### Human:' or '### Assistant:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    messages: list[Message] = [
        {"role": roles[who], "content": content.strip()}
        for who, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    while messages and messages[-1]["role"] == "user":
        messages.pop()
    return conversation(messages)


def _text(row: Row, key: str, where: str, *, required: bool = True) -> str:
    value = row.get(key)
    if value is None and not required:
        return ""
    if value is None:
        raise RowError(f"{where} has no {key!r}")
    if not isinstance(value, str):
        raise RowError(f"{where}: {key!r} is {type(value).__name__}, not text")
    return value


# format name -> (the key that gives it away, its converter)
FORMATS: dict[str, tuple[str, Callable[[Row], Conversation]]] = {
    "messages": ("messages", from_messages),
    "xtuner": ("conversation", from_xtuner),
    "alpaca": ("instruction", from_alpaca),
    "guanaco": ("text", from_guanaco),
}


def detect_format(row: Any) -> str:
    """Name the format of a row by its keys.

    Raises:
        RowError: no known format has these keys.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"row is {type(row).__name__}, not an object")
    for name, (key, _) in FORMATS.items():
        if key in row:
            return name
    keys = ", ".join(sorted(map(str, row))[:6]) or "none"
    wanted = ", ".join(f"{key} ({name})" for name, (key, _) in FORMATS.items())
    raise RowError(f"no known format has the keys {keys}; expected one of {wanted}")


def to_conversation(row: Any, *, row_format: str = "auto") -> Conversation:
    """Turn one row into a conversation.

    Raises:
        RowError: the row does not fit its format.
        InputError: `row_format` names no format.
    """
    if row_format == "auto":
        row_format = detect_format(row)
    elif row_format not in FORMATS:
        raise InputError(
            f"format {row_format!r} is unknown: choose auto, {', '.join(FORMATS)}{did_you_mean(row_format, FORMATS)}"
        )
    key, convert = FORMATS[row_format]
    if not isinstance(row, Mapping) or key not in row:
        raise RowError(f"has no {key!r}, which format {row_format} needs")
    return convert(row)
