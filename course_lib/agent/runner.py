"""The loop of an agent: the model writes a turn, its calls are run, their results are fed back, until it answers.

It prints nothing: it yields events (`events.py`). What it fed and got is a trace, a `messages` row with tools, and so training
data: the protocol renders it for training as it was rendered here.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from course_lib.agent.events import Answered, Called, Ended, Event, Malformed, Returned, Thought, Why, Words
from course_lib.agent.protocol import AgentProtocol, choose_protocol
from course_lib.agent.tools import AgentTool, Outcome, run_tool
from course_lib.agent.turns import Turn, malformed, numbered, what_is_wrong, write_arguments
from course_lib.chat.history import system_text, take_back_question
from course_lib.data.conversation import Conversation, Message, RowError, ToolCall
from course_lib.errors import CourseError, InputError
from course_lib.files import file_to_write, write_text

if TYPE_CHECKING:
    from course_lib.chat.session import ChatSession

LAST_TURN = "[this was the last call; give the final answer now]"
REPEATED = "[this call was made before, with this result; use it, or give the final answer]"
MOST_REPEATS = 2  # repeated calls of one question; one more ends it
_CLOSING: dict[Why, str] = {
    "turns": "I found no answer within {turns} turns.",
    "repeats": "I found no answer: I made the same call again and again.",
    "context": "I found no answer: the conversation is too long for my context.",
    "stopped": "(stopped)",
}


class Writer(Protocol):
    """What writes turns: a `ChatSession`, or a client of a server."""

    def stream_turn(self, row: Conversation) -> Generator[str, None, None]:
        """Yield pieces of the next assistant turn of a rendered conversation."""

    def fits(self, row: Conversation) -> bool:
        """Whether a rendered conversation leaves room for a turn."""

    def stop(self) -> None:
        """End the turn being written; from any thread."""


class AgentRunner:
    """A conversation with an agent.

    `messages` is all that was said, calls and results included. When it does not fit into the context, the oldest questions are
    not fed, with all that followed them; they stay in `messages`.
    """

    def __init__(
        self,
        writer: Writer,
        tools: Sequence[AgentTool],
        *,
        protocol: AgentProtocol,
        system: str = "",
        max_turns: int = 8,
    ) -> None:
        """Start a conversation.

        Raises:
            InputError: two tools of one name, or `max_turns` below 1.
        """
        names = [tool.name for tool in tools]
        if twice := {name for name in names if names.count(name) > 1}:
            raise InputError(f"two tools are called {', '.join(sorted(twice))}; give one another name")
        if max_turns < 1:
            raise InputError(f"max_turns is {max_turns}; it must be 1 or more")
        self.writer, self.protocol, self.max_turns = writer, protocol, max_turns
        self.tools = {tool.name: tool for tool in tools}
        self._schemas = [tool.schema for tool in tools]
        self._stop_requested = False
        # Weak, so that leaving a loop over the events still closes it.
        self._unfinished: weakref.ref[Generator[Event, None, None]] | None = None
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def stream(self, question: str) -> Generator[Event, None, None]:
        """Ask, and yield the events up to `Ended`. An exception leaves the conversation as it was before the question.

        Raises:
            InputError: at once: the question is empty or no valid Unicode; while it is read: too long for the context.
            CourseError: at once: another thread is reading the events of a question.
        """
        self._close_unfinished()
        if not question.strip():
            raise InputError("the message is empty; write a question")
        if question != question.encode("utf-8", "replace").decode():
            raise InputError("the text is no valid Unicode; use UTF-8")
        events = self._events(question)
        self._unfinished = weakref.ref(events)
        return events

    def ask(self, question: str) -> str:
        """Ask and return the answer alone. Raises what `stream` raises."""
        return next(event.text for event in list(self.stream(question))[::-1] if isinstance(event, Answered))

    def stop(self) -> None:
        """End the work on a question within a token, or a moment where a tool is at work; from any thread or signal handler."""
        self._stop_requested = True
        self.writer.stop()

    def reset(self) -> None:
        """Forget all but the system turn.

        Raises:
            CourseError: another thread is reading the events of a question.
        """
        self._close_unfinished()
        del self.messages[1 if self.system else 0 :]

    def set_system(self, text: str) -> None:
        """Start anew with another system turn; an empty text leaves it out. Raises as `reset`."""
        self._close_unfinished()
        self.messages[:] = [{"role": "system", "content": text}] if text else []

    def take_back(self) -> str:
        """Forget the last question and all that followed it, so that it can be asked again; return the question.

        Raises:
            InputError: there is no question in the history.
            CourseError: another thread is reading the events of a question.
        """
        self._close_unfinished()
        return take_back_question(self.messages)

    @property
    def system(self) -> str:
        """The system turn's text, empty when there is none."""
        return system_text(self.messages)

    @property
    def trace(self) -> Conversation:
        """All that was said as a row to train on: calls and results numbered, malformed turns with `train: False`."""
        return numbered({"messages": list(self.messages), "tools": list(self._schemas)})

    def save(self, path: str | Path) -> Path:
        """Write the trace as one row of a JSONL file; `events.replay` shows it again.

        Raises:
            InputError: nothing was said yet, or something stands at `path` or it cannot be written.
            CourseError: the disk is full.
        """
        if not any(message["role"] == "assistant" for message in self.messages):
            raise InputError(f"{path}: nothing to save, for nothing was said yet")
        path = file_to_write(Path(path).expanduser(), overwrite=False)
        write_text(path, json.dumps(self.trace, ensure_ascii=False) + "\n")
        return path

    def _events(self, question: str) -> Generator[Event, None, None]:
        self._stop_requested = False
        before = len(self.messages)
        self.messages.append({"role": "user", "content": question})
        turns = 0
        made: dict[str, Outcome] = {}  # the calls of this question
        repeats = 0
        try:
            why: Why | None = None
            while why is None:
                row = self._fed(before)
                if row is None:
                    if not turns:
                        raise InputError("the message is too long for the context; shorten it, or lower max_new_tokens")
                    why = "context"
                    break
                turns += 1
                turn, text = yield from self._turn(row)
                if self._stop_requested:
                    why = "stopped"
                    if turn.answer:
                        self.messages.append({**turn.message(), "train": False})
                        yield Answered(turn.answer)
                elif turn.error:
                    self.messages += [malformed(text), {"role": "tool", "content": turn.error}]
                    yield Malformed(text, turn.error)
                    why = "turns" if turns == self.max_turns else None
                else:
                    self.messages.append(turn.message())
                    if turn.thought:
                        yield Thought(turn.thought)
                    if not turn.calls:
                        yield Answered(turn.answer or "")
                        why = "answer"
                    else:
                        last = turns >= self.max_turns - 1
                        repeats += yield from self._run(turn.calls, made, last=last, run=turns < self.max_turns)
                        why = "turns" if turns == self.max_turns else "repeats" if repeats > MOST_REPEATS else None
                        why = "stopped" if self._stop_requested else why
            if self.messages[-1]["role"] != "assistant":
                closing = _CLOSING[why].format(turns=turns)
                self.messages.append({"role": "assistant", "content": closing, "train": False})
                yield Answered(closing)
            yield Ended(why, turns)
        except GeneratorExit:  # no longer read
            self._close()
            raise
        except BaseException:
            del self.messages[before:]
            raise

    def _turn(self, row: Conversation) -> Generator[Event, None, tuple[Turn, str]]:
        """Let the model write a turn; return it, read, and its text."""
        text, shown = "", {"thought": "", "answer": ""}
        pieces = self.writer.stream_turn(row)
        try:
            for piece in pieces:
                text += piece
                thought, answer, done = self.protocol.so_far(text)
                for kind, so_far in (("thought", thought), ("answer", answer)):
                    if so_far.startswith(shown[kind]) and len(so_far) > len(shown[kind]):
                        yield Words(kind, so_far[len(shown[kind]) :])  # type: ignore[arg-type]
                        shown[kind] = so_far
                if done or self._stop_requested:
                    break
        finally:
            pieces.close()
        return self.protocol.read_turn(text), text

    def _run(
        self, calls: Sequence[ToolCall], made: dict[str, Outcome], *, last: bool, run: bool
    ) -> Generator[Event, None, int]:
        """Run calls and record their results; return how many were repeated ones."""
        repeats = 0
        for number, one in enumerate(calls, start=1):
            name, arguments = one["function"]["name"], one["function"]["arguments"]
            yield Called(name, arguments)
            key = f"{name} {write_arguments(dict(sorted(arguments.items())))}"
            if not run or self._stop_requested:
                outcome = Outcome("error: not run: the conversation ends here", failed=True, seconds=0.0)
            elif wrong := what_is_wrong(one, self._schemas):
                outcome = Outcome(f"error: {wrong}", failed=True, seconds=0.0)
            elif key in made:
                repeats += 1
                outcome = Outcome(f"{made[key].text}\n{REPEATED}", failed=made[key].failed, seconds=0.0)
            else:
                outcome = made[key] = run_tool(self.tools[name], arguments, stopped=lambda: self._stop_requested)
            text = f"{outcome.text}\n{LAST_TURN}" if last and run and number == len(calls) else outcome.text
            self.messages.append({"role": "tool", "name": name, "content": text})
            yield Returned(name, text, outcome.failed, outcome.seconds)
        return repeats

    def _fed(self, question: int) -> Conversation | None:
        """What the model is fed: as much of the conversation as fits, rendered; None where not even the last question does."""
        opening = self.messages[:1] if self.system else []
        starts = [place for place, message in enumerate(self.messages) if message["role"] == "user"]
        for start in starts:
            if start > question:
                break
            row: Conversation = {"messages": [*opening, *self.messages[start:]]}
            if self._schemas:
                row["tools"] = list(self._schemas)
            try:
                rendered = self.protocol.render(row)
            except RowError as error:
                raise CourseError(f"the conversation has no form in protocol {self.protocol.name}: {error}") from None
            if self.writer.fits(rendered):
                return rendered
        return None

    def _close_unfinished(self) -> None:
        """Events that are still held but no longer read count as abandoned."""
        events = self._unfinished() if self._unfinished else None
        if events is not None:
            if events.gi_running:
                raise CourseError("an answer is still being written; stop() it and wait for its end")
            events.close()

    def _close(self) -> None:
        """Make the conversation whole where it was left: every call has a result, and the last turn is the model's."""
        calls = [one for message in self.messages for one in message.get("tool_calls") or ()]
        results = sum(message["role"] == "tool" and "name" in message for message in self.messages)
        for one in calls[results:]:
            self.messages.append(
                {"role": "tool", "name": one["function"]["name"], "content": "error: not run: stopped"}
            )
        if self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": _CLOSING["stopped"], "train": False})


def agent_of(
    session: ChatSession, tools: Sequence[AgentTool], *, protocol: str = "auto", max_turns: int = 8
) -> AgentRunner:
    """An agent that writes with the session's model, template, sampling and system turn.

    Raises:
        InputError: an unknown protocol, or `native` with a template that has no tools; two tools of one name.
    """
    chosen = choose_protocol(protocol, session.template, session.tokenizer)
    return AgentRunner(session, tools, protocol=chosen, system=session.system, max_turns=max_turns)
