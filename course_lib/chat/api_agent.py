"""An agent whose turns a server writes, while its tools run here."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator, Sequence
from typing import Any

from course_lib.agent.events import Answered, Ended, Event, Words
from course_lib.agent.native import CallForm, Native
from course_lib.agent.protocol import AgentProtocol, choose_protocol
from course_lib.agent.runner import AgentRunner
from course_lib.agent.tools import AgentTool
from course_lib.agent.turns import write_arguments
from course_lib.chat.api_client import ApiAnswer
from course_lib.data.conversation import Conversation, Message
from course_lib.errors import CourseError

API_PROTOCOLS = ("react", "react_en", "react_zh", "react_brief", "native")
SECONDS_TO_STOP = 5
_LOOK_UP_SECONDS = 0.02
# Calls that the server has read already, as text again: the form is as good as any other.
_READ_BY_SERVER = CallForm("<tool_call>", "\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>", "arguments")


def api_protocol(name: str) -> AgentProtocol:
    """A protocol by name; `native` leaves it to the server to render tools and to read calls.

    Raises:
        InputError: there is none of that name.
    """
    return Native(_READ_BY_SERVER) if name == "native" else choose_protocol(name)


class ApiWriter:
    """Writes an agent's turns with a model of a server. What does not fit into the context, the server refuses."""

    def __init__(self, url: str, api_key: str, **settings: Any) -> None:
        self._url, self._key, self._settings = url, api_key, settings
        self._answer: ApiAnswer | None = None

    def stream_turn(self, row: Conversation) -> Generator[str, None, None]:
        """Yield pieces of the next turn; calls that the server has read come as text at its end.

        Raises:
            CourseError: the server does not answer, refuses, or breaks off.
        """
        tools = {"tools": row["tools"]} if row.get("tools") else {}
        messages = [_as_sent(message) for message in row["messages"]]
        answer = self._answer = ApiAnswer(self._url, self._key, messages=messages, **tools, **self._settings)
        try:
            sent = 0
            while True:
                ended = answer.wait(_LOOK_UP_SECONDS)
                if text := answer.text[sent:]:
                    yield text
                    sent += len(text)
                if ended:
                    break
            if answer.failure is not None:
                raise answer.failure
            if answer.calls:
                yield _as_text(answer.calls)
        finally:
            answer.stop()

    def fits(self, row: Conversation) -> bool:
        """Only the server knows."""
        return True

    def stop(self) -> None:
        """End the turn being written."""
        if self._answer is not None:
            self._answer.stop()


class AgentAnswer:
    """An agent at work on a question, on a thread of its own: `text` is its answer so far, `steps` what it did for it."""

    def __init__(
        self,
        writer: ApiWriter,
        question: str,
        *,
        tools: Sequence[AgentTool],
        protocol: str,
        system: str,
        history: Sequence[Message],
    ) -> None:
        self.text = ""
        self.steps: list[Event] = []
        self.failure: CourseError | None = None
        self._runner = AgentRunner(writer, tools, protocol=api_protocol(protocol), system=system)
        self._runner.messages += history
        self._before = len(self._runner.messages)
        self._ended = threading.Event()
        threading.Thread(target=self._run, args=(question,), name="api agent", daemon=True).start()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for its end, at most so long; return whether it has ended."""
        return self._ended.wait(seconds)

    def stop(self) -> None:
        """End the work."""
        self._runner.stop()

    def messages(self) -> list[Message]:
        """Question, calls, results and answer; nothing where it failed. Waits for an agent that was stopped."""
        self.wait(SECONDS_TO_STOP)
        return [] if self.failure else self._runner.messages[self._before :]

    def _run(self, question: str) -> None:
        try:
            for event in self._runner.stream(question):
                if isinstance(event, Words):
                    self.text += event.text if event.kind == "answer" else ""
                elif isinstance(event, Answered):
                    self.text = event.text
                elif not isinstance(event, Ended):
                    self.text = ""  # the words before a call were no answer
                    self.steps.append(event)
        except CourseError as error:
            self.failure = error
        except Exception as error:
            self.failure = CourseError(f"the agent failed: {type(error).__name__}: {' '.join(str(error).split())}")
        finally:
            self._ended.set()


def _as_sent(message: Message) -> dict[str, Any]:
    """A message as OpenAI's API has it: arguments are JSON text."""
    sent: dict[str, Any] = {key: message[key] for key in ("role", "content", "tool_call_id") if key in message}  # type: ignore[literal-required]
    if calls := message.get("tool_calls"):
        sent["tool_calls"] = [
            {**one, "function": {**one["function"], "arguments": write_arguments(one["function"]["arguments"])}}
            for one in calls
        ]
    return sent


def _as_text(calls: Sequence[dict[str, str]]) -> str:
    objects = [f'{{"name": {json.dumps(one["name"])}, "arguments": {one["arguments"] or "{}"}}}' for one in calls]
    form = _READ_BY_SERVER
    return form.mark + form.opening + form.join.join(objects) + form.after
