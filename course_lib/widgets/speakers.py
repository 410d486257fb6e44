"""What a chat box talks to, a session or an agent, and how what they yield becomes an answer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from course_lib.agent.events import Answered, Called, Ended, Malformed, Returned, Thought, Words, replay
from course_lib.errors import CourseError
from course_lib.widgets.transcript import Answer, Turn, empty_answer

if TYPE_CHECKING:
    from course_lib.agent.runner import AgentRunner
    from course_lib.chat.session import ChatSession
    from course_lib.data.conversation import Message, Tool

SECONDS_BETWEEN_UPDATES = 0.08  # an update is a message to the browser: twelve a second look like typing
THINKS = "thinks"
_CUT_SHORT = {
    "turns": "it used all its turns",
    "repeats": "it made the same call again and again",
    "context": "the context is full",
    "stopped": "stopped",
}


class Speaker:
    """One side of a chat. `conversation` has the history; `session` is what computes, and what sampling is set on."""

    def __init__(self, conversation: ChatSession | AgentRunner) -> None:
        self.conversation = conversation
        self.session: ChatSession = getattr(conversation, "writer", conversation)
        self.tools: list[Tool] = [tool.schema for tool in getattr(conversation, "tools", {}).values()]

    def write(
        self,
        stream: Generator[Any, None, None],
        answer: Answer,
        *,
        stopping: Callable[[], bool],
        show: Callable[[], None],
    ) -> None:
        """Read an answer to its end into `answer`; call `show` now and then. What goes wrong becomes its note."""
        answer["state"] = "writing"
        show()  # the reader sees whose turn it is while the model reads the question
        trimmed, started, shown = getattr(self.conversation, "trimmed_turns", 0), time.monotonic(), 0.0
        stats, tokens, seconds = self.session.last_stats, 0, 0.0  # of the turns that are over: an agent takes several
        try:
            for piece in stream:
                fold(answer, piece)
                if self.session.last_stats is not stats:
                    stats = self.session.last_stats
                    tokens, seconds = tokens + stats.new_tokens, seconds + stats.seconds
                answer["tokens"] = tokens + self.session.new_tokens
                answer["tokens_per_second"] = answer["tokens"] / max(time.monotonic() - started, 1e-9)
                if stopping():
                    self.conversation.stop()
                if time.monotonic() - shown > SECONDS_BETWEEN_UPDATES or not isinstance(piece, str | Words):
                    show()
                    shown = time.monotonic()
        except Exception as error:
            told = (
                str(error) if isinstance(error, CourseError) else f"the model failed: {type(error).__name__}: {error}"
            )
            answer.update(state="failed", note=" ".join(told.split()))
            return
        if self.session.last_stats is not stats:
            stats = self.session.last_stats
            tokens, seconds = tokens + stats.new_tokens, seconds + stats.seconds
        answer.update(tokens=tokens, tokens_per_second=tokens / max(seconds, 1e-9), messages=self._last_turn())
        if answer["state"] == "writing":  # no agent, which says itself how it ended
            ended = {"end": "", "length": f"cut off at {stats.new_tokens} tokens", "stop": "stopped"}[stats.stopped]
            answer.update(state="cut" if ended else "done", note=ended)
        gone = getattr(self.conversation, "trimmed_turns", 0) - trimmed
        if gone:
            left_out = f"the oldest {gone} messages no longer fit into the context"
            answer["note"] = "; ".join(filter(None, (answer["note"], left_out)))

    def turns_so_far(self) -> list[Turn]:
        """What the history holds already."""
        messages = self.conversation.messages
        starts = [number for number, message in enumerate(messages) if message["role"] == "user"]
        turns: list[Turn] = []
        for start, end in pairwise([*starts, len(messages)]):
            answer = empty_answer()
            for event in replay({"messages": messages[start:end]}):
                fold(answer, event)
            answer.update(state="done", messages=_copies(messages[start:end]))
            turns.append(Turn(question=messages[start]["content"], answers=[answer]))
        return turns

    def _last_turn(self) -> list[Message]:
        messages = self.conversation.messages
        return _copies(messages[max(number for number, one in enumerate(messages) if one["role"] == "user") :])


def fold(answer: Answer, piece: Any) -> None:
    """Add a piece of text, or an event of an agent, to an answer: the answer's words are its text, all else are steps."""
    steps = answer["steps"]
    match piece:
        case str(text) | Words("answer", text):
            answer["text"] += text
        case Words(_, text):
            if not (steps and steps[-1]["title"] == THINKS):
                steps.append({"title": THINKS, "text": ""})
            steps[-1]["text"] += text
        case Thought(text):
            if steps and steps[-1]["title"] == THINKS:  # its words have come already
                steps.pop()
            steps.append({"title": THINKS, "text": text})
            answer["text"] = ""  # words that looked like an answer, before a call followed
        case Called(name, arguments):
            steps.append({"title": f"calls {name}", "text": json.dumps(arguments, ensure_ascii=False)})
        case Returned(name, text, failed):
            steps.append({"title": f"{name} {'fails' if failed else 'returns'}", "text": text})
        case Malformed(text, error):
            steps.append({"title": "writes what cannot be read", "text": f"{text}\n{error}"})
            answer["text"] = ""
        case Answered(text):
            answer["text"] = text
        case Ended(why):
            answer.update(state="cut" if why in _CUT_SHORT else "done", note=_CUT_SHORT.get(why, ""))


def _copies(messages: Iterable[Message]) -> list[Message]:
    return [message.copy() for message in messages]
