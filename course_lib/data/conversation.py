"""The one form every row is turned into: the Hugging Face / OpenAI `messages` list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from course_lib.errors import did_you_mean

ROLES = ("system", "user", "assistant", "tool")


class Message(TypedDict):
    """One turn. `train: False` on an assistant turn keeps it out of the loss."""

    role: str
    content: str
    train: NotRequired[bool]


class Conversation(TypedDict):
    """`messages` in order: at most one system turn, first; then user, tool and assistant turns."""

    messages: list[Message]


class RowError(ValueError):
    """A row does not fit; the message is the reason alone. The reader adds file and row number."""


def conversation(messages: list[Message]) -> Conversation:
    """Check the messages and wrap them.

    Raises:
        RowError: no messages, an unknown role, content that is not text, a system turn that is not first,
            or no assistant turn with an answer in it.
    """
    if not messages:
        raise RowError("no messages")
    for number, message in enumerate(messages, start=1):
        _check_message(message, number)
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise RowError("no output: no assistant turn with an answer in it")
    return {"messages": messages}


def _check_message(message: Any, number: int) -> None:
    if not isinstance(message, Mapping):
        raise RowError(f"message {number} is {type(message).__name__}, not an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        raise RowError(f"message {number}: unknown role {role!r} (known: {', '.join(ROLES)}){hint}")
    if not isinstance(content, str):
        raise RowError(f"message {number} ({role}): content is {type(content).__name__}, not text")
    if role == "system" and number > 1:
        raise RowError(f"message {number}: a system turn must come first")
