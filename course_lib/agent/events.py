"""What happens while an agent works, as events: a terminal, a widget and a web app show the same ones.

A turn of the model comes as `Words` while it is written, and then as what it turned out to be: a `Thought`, `Called` with what
`Returned`, `Malformed`, or `Answered`. A question ends with `Ended`. Whoever does not show words as they come leaves `Words` out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from course_lib.agent.turns import is_malformed
from course_lib.data.conversation import Conversation

Why = Literal["answer", "turns", "repeats", "context", "stopped"]


@dataclass(frozen=True)
class Words:
    """A piece of a thought or an answer as it is written. A native call may follow words; then they were a thought."""

    kind: Literal["thought", "answer"]
    text: str


@dataclass(frozen=True)
class Thought:
    """The whole thought of a turn."""

    text: str


@dataclass(frozen=True)
class Called:
    """The model calls a tool."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Returned:
    """What the model gets to see of a call; `failed` where the tool was not run or raised. `seconds` is None in a replay."""

    name: str
    text: str
    failed: bool
    seconds: float | None


@dataclass(frozen=True)
class Malformed:
    """A turn that could not be read, and what the model is told of it."""

    text: str
    error: str


@dataclass(frozen=True)
class Answered:
    """The whole answer."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The question is over after so many turns of the model: it answered, or `max_turns` was reached, it repeated a call again
    and again, the context was full, or the user stopped it."""

    why: Why
    turns: int


Event = Words | Thought | Called | Returned | Malformed | Answered | Ended


def replay(row: Conversation) -> Iterator[Event]:
    """The events of a saved trace, without `Words` and `Ended`; nothing is run."""
    messages = row["messages"]
    names: list[str] = []
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            if names:
                text = message["content"]
                yield Returned(names.pop(0), text, failed=text.startswith("error: "), seconds=None)
        elif is_malformed(messages, index):
            yield Malformed(message["content"], messages[index + 1]["content"])
        elif message["role"] == "assistant":
            calls = message.get("tool_calls") or []
            thought = message["content"] if calls else message.get("reasoning_content", "")
            if thought:
                yield Thought(thought)
            for one in calls:
                yield Called(one["function"]["name"], one["function"]["arguments"])
            names = [one["function"]["name"] for one in calls]
            if not calls:
                yield Answered(message["content"])
