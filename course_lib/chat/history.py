"""A conversation's history, as a chat session and an agent both keep it: a list of messages, a system turn first if there is one."""

from __future__ import annotations

from collections.abc import Sequence

from course_lib.data.conversation import Message
from course_lib.errors import InputError


def system_text(messages: Sequence[Message]) -> str:
    """The system turn's text, empty when there is none."""
    return messages[0]["content"] if messages and messages[0]["role"] == "system" else ""


def take_back_question(messages: list[Message]) -> str:
    """Remove the last question and all that followed it; return the question.

    Raises:
        InputError: there is no question in the history.
    """
    asked = [number for number, message in enumerate(messages) if message["role"] == "user"]
    if not asked:
        raise InputError("nothing to take back, for nothing was asked yet")
    question = messages[asked[-1]]["content"]
    del messages[asked[-1] :]
    return question
