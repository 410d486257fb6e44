"""Formats of one text a row: openassistant-guanaco's dialogues, and plain text for continued pre-training."""

from __future__ import annotations

import re
from typing import Any

from course_lib.data.conversation import Conversation, Message, RowError, conversation, plain_text, shown
from course_lib.data.formats_fields import Row, leave_off_unanswered, text_field

_TURN = re.compile(r"### (Human|Assistant):")  # any other "### heading" is part of the answer
_ROLE_OF = {"Human": "user", "Assistant": "assistant"}


def has_turn_marks(row: Row) -> bool:
    """Whether the text of a row is a dialogue: it has `### Human:` or `### Assistant:` anywhere."""
    text: Any = row.get("text")
    return isinstance(text, str) and bool(_TURN.search(text))


def from_guanaco(row: Row, notes: list[str]) -> Conversation:
    """openassistant-guanaco: one text with `### Human:` and `### Assistant:` before the turns, often on the same line.

    A last human turn that nobody answered carries nothing to learn and is left off, with a note.
    Source: https://huggingface.co/datasets/timdettmers/openassistant-guanaco
    """
    text = text_field(row, "text", "row")
    before, *pieces = _TURN.split(text)
    if before.strip() or not pieces:
        raise RowError(
            f"text does not begin with '### Human:' or '### Assistant:' but with {shown(text[:40])}; if it is plain text, set format text"
        )
    messages: list[Message] = [
        {"role": _ROLE_OF[who], "content": content.strip()}
        for who, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    return conversation(leave_off_unanswered(messages, notes))


def from_text(row: Row, notes: list[str]) -> Conversation:
    """Plain text for continued pre-training, kept as it is: `{"text"}`, the form of most corpora on the Hub."""
    return plain_text(text_field(row, "text", "row"))
