"""An agent in a terminal, or over pipes: answers on stdout; thoughts, calls and results on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TextIO

from course_lib.agent.events import Answered, Called, Ended, Malformed, Returned, Thought, Words
from course_lib.agent.isolation import isolation_in_force
from course_lib.agent.mcp_tools import McpServer
from course_lib.agent.protocol import choose_protocol
from course_lib.agent.runner import AgentRunner
from course_lib.agent.tools import AgentTool, shipped_tools
from course_lib.agent.turns import write_arguments
from course_lib.chat.terminal import TerminalChat, interrupt_stops, printable, write
from course_lib.errors import CourseError, InputError

LONGEST_SHOWN = 300  # characters of a result on stderr


@contextmanager
def open_tools(names: str | None, mcp_commands: Sequence[str] = ()) -> Iterator[list[AgentTool]]:
    """The tools named, with commas between (none: the default ones), and those of MCP servers, which run as long as the context.

    Raises:
        InputError: an unknown tool, one that this machine cannot hold, or a command that is no MCP server.
    """
    chosen = None if names is None else [name.strip() for name in names.split(",") if name.strip()]
    with ExitStack() as servers:
        yield [
            *shipped_tools(chosen),
            *(tool for command in mcp_commands for tool in servers.enter_context(McpServer(command)).tools),
        ]


def agent_terminal(
    runner: AgentRunner,
    *,
    input_stream: TextIO | None = None,
    output_stream: TextIO | None = None,
    notice_stream: TextIO | None = None,
) -> None:
    """As `chat_terminal`, with an agent. A question it finds no answer to counts as failed."""
    chat = _AgentChat(runner, input_stream or sys.stdin, output_stream or sys.stdout, notice_stream or sys.stderr)
    chat.notice(f"protocol {runner.protocol.name}; tools: {', '.join(runner.tools) or 'none'}")
    if "search" in runner.tools and not os.environ.get("SERPER_API_KEY"):
        chat.notice(
            "search looks into the course's small encyclopedia; with SERPER_API_KEY of serper.dev, into the web"
        )
    if "python" in runner.tools:
        chat.notice(f"python is held by {', '.join(isolation_in_force())}")
    chat.run()


def agent_once(
    runner: AgentRunner, text: str, *, output_stream: TextIO | None = None, notice_stream: TextIO | None = None
) -> None:
    """Write the answer to one question on stdout, and the steps to it on stderr.

    Raises:
        CourseError: it found no answer, or what `runner.stream` raises.
    """
    _AgentChat(runner, sys.stdin, output_stream or sys.stdout, notice_stream or sys.stderr).answer(text)


@dataclass
class _AgentChat(TerminalChat):
    session: AgentRunner

    def answer(self, text: str) -> None:
        with interrupt_stops(self.session) if self.input.isatty() else nullcontext():
            ended = self._show(text)
        stats = getattr(self.session.writer, "last_stats", None)
        if stats and stats.stopped == "length":
            self.notice(f"[cut off at max_new_tokens {stats.new_tokens}]")
        if ended.why == "stopped":
            self.notice("[stopped]")
        elif ended.why != "answer":
            raise CourseError(f"the agent found no answer ({_REASONS[ended.why]}, after {ended.turns} turns)")

    def stats(self, argument: str) -> None:
        stats = getattr(self.session.writer, "last_stats", None)
        if stats is None:
            self.notice("no answer yet")
            return
        self.notice(
            f"last turn: {stats.prompt_tokens} prompt tokens, {stats.new_tokens} new tokens in {stats.seconds:.1f} s "
            f"({stats.tokens_per_second:.1f} tokens/s)"
        )

    def _show(self, question: str) -> Ended:
        """Show the events of a question. On a terminal an answer is shown as it is written; a pipe gets it once it is whole."""
        live = self.output.isatty()
        streamed = ""
        events = self.session.stream(question)
        with closing(events):
            for event in events:
                if isinstance(event, Words) and event.kind == "answer" and live:
                    streamed += event.text
                    write(self.output, printable(event.text))
                    continue
                if isinstance(event, Answered):
                    if streamed != event.text:
                        write(self.output, ("\n" if streamed else "") + printable(event.text))
                    write(self.output, "\n")
                    streamed = ""
                elif not isinstance(event, Words):
                    if streamed:  # the words before a native call were no answer
                        write(self.output, "\n")
                        streamed = ""
                    if line := _step(event):
                        self.notice(printable(line))
                if isinstance(event, Ended):
                    return event
        raise CourseError("the agent ended without a word")


_REASONS = {
    "turns": "the most turns it may take",
    "repeats": "it repeated a call",
    "context": "the context is full",
}


def _step(event: Any) -> str:
    """An event on one line, for stderr."""
    match event:
        case Thought(text):
            return f"thought: {_one_line(text)}"
        case Called(name, arguments):
            return f"call: {name} {_one_line(write_arguments(arguments))}"
        case Returned(_, text, failed, seconds):
            return f"{'failed' if failed else 'result'}: {_one_line(text)}" + (f" ({seconds:.1f} s)" if seconds else "")
        case Malformed(text, error):
            return f"could not be read: {_one_line(text)}: {_one_line(error)}"
    return ""


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]} …"


def check_options(protocol: str | None, max_turns: int) -> None:
    """Refuse wrong options before a model is loaded.

    Raises:
        InputError: an unknown protocol, or `max_turns` below 1.
    """
    if protocol not in (None, "auto"):
        choose_protocol(protocol)
    if max_turns < 1:
        raise InputError(f"--max-turns {max_turns}: it must be 1 or more")
