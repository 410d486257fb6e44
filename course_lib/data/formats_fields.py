"""Fields of a row, read with errors that name them; shared by the converters of all formats.

A converter gets the row and a list, `notes`: where its rule leaves something off, or reads it in a way the writer may not
have meant, it appends one short sentence there, so that a report can count it. The same rule always gives the same sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from course_lib.data.conversation import Message, RowError, check_text, json_type, shown

Row = Mapping[str, Any]

UNANSWERED = "the last user turn, which has no answer, left off"


def text_field(row: Row, key: str, where: str) -> str:
    """Text under `key`.

    Raises:
        RowError: the key is missing or null, or its value is not text.
    """
    if row.get(key) is None:
        raise RowError(f"{where} has no {key!r}")
    return check_text(row[key], f"{where}: {key!r}")


def optional_text_field(row: Row, key: str, where: str) -> str:
    """Text under `key`, or `""` where the key is missing or null.

    Raises:
        RowError: the value is not text.
    """
    return "" if row.get(key) is None else text_field(row, key, where)


def list_field(row: Row, key: str, of: str) -> list[Any]:
    """The list under `key`; `of` says in the error what it should hold.

    Raises:
        RowError: the value is not a list.
    """
    value = row[key]
    if not isinstance(value, list):
        raise RowError(f"{key} is {json_type(value)}, not a list of {of}: {shown(value)}")
    return value


def system_message(system: str) -> list[Message]:
    """The opening of a conversation: a system turn, or nothing where the text is blank."""
    return [{"role": "system", "content": system}] if system.strip() else []


def leave_off_unanswered(messages: list[Message], notes: list[str]) -> list[Message]:
    """Leave off user turns at the end, which nobody answered: they carry nothing to learn. Noted once."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "user":
        end -= 1
    if not end or end == len(messages):
        return messages
    notes.append(UNANSWERED)
    return messages[:end]


def note_left_out(turn: Row, known: Iterable[str], notes: list[str]) -> None:
    """Note the keys of a turn that hold something and that no rule reads."""
    known = set(known)
    left = [key for key in turn if key not in known and turn[key]]
    note = f"keys of a turn left out: {key_names(left)}"
    if left and note not in notes:
        notes.append(note)


def key_names(keys: Iterable[Any], most: int = 6) -> str:
    """Keys as an error lists them: sorted, the first few, odd ones quoted; "none" where there are none."""
    names = sorted(key if isinstance(key, str) and len(key) <= 40 and key.isprintable() else shown(key) for key in keys)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"
