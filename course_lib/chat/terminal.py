"""Chat in a terminal, or over pipes: one question a line in, answers on stdout, all else on stderr."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from course_lib.errors import CourseError, InputError, did_you_mean

if TYPE_CHECKING:
    from course_lib.chat.session import ChatSession

PROMPT = "you> "
CONTINUED = "...> "
LONGEST_SEQUENCE = 64  # characters; an escape sequence longer than this is no real one

# ECMA-48: a control sequence is ESC [ or C1 CSI, parameters, intermediates, one final byte; then all other control characters.
_CONTROL = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_UNFINISHED = re.compile(r"(?:\x1b|(?:\x1b\[|\x9b)[0-?]*[ -/]*)\Z")


def printable(text: str) -> str:
    """Leave out escape sequences and control characters, but for newline and tab: they could move the cursor or worse."""
    return _CONTROL.sub("", text)


def printable_pieces(pieces: Iterable[str]) -> Iterator[str]:
    """Make a stream printable piece by piece; an escape sequence may lie across several pieces."""
    held = ""
    for piece in pieces:
        text = held + piece
        unfinished = _UNFINISHED.search(text)
        end = unfinished.start() if unfinished and len(text) - unfinished.start() < LONGEST_SEQUENCE else len(text)
        held = text[end:]
        if shown := printable(text[:end]):
            yield shown
    if shown := printable(held):
        yield shown


def chat_terminal(
    session: ChatSession,
    *,
    input_stream: TextIO | None = None,
    output_stream: TextIO | None = None,
    notice_stream: TextIO | None = None,
) -> None:
    """Chat until the user leaves or the input ends. By default over stdin, stdout and stderr.

    With a terminal as input: line editing, and Ctrl-C stops the answer being written. Otherwise every line is a question or a
    command of one conversation; lines that fail are told on `notice_stream` and the next ones still answered.

    Raises:
        InputError: not in a terminal: lines of the input were wrong, told at the end; or the input is not UTF-8, told at once.
        CourseError: not in a terminal: the model failed on some lines, told at the end.
        KeyboardInterrupt: not in a terminal: Ctrl-C.
    """
    TerminalChat(session, input_stream or sys.stdin, output_stream or sys.stdout, notice_stream or sys.stderr).run()


def answer_once(session: ChatSession, text: str, *, output_stream: TextIO | None = None) -> None:
    """Write the answer to one question, and nothing else.

    Raises:
        CourseError: what `session.stream` raises.
    """
    _write_answer(session, text, output_stream or sys.stdout)


@dataclass
class TerminalChat:
    """The loop over questions and commands; an agent's (`course_lib.agent.terminal`) answers in another way."""

    session: Any  # a ChatSession, or what has its history's methods
    input: TextIO
    output: TextIO
    notices: TextIO

    def run(self) -> None:
        """Chat until the user leaves or the input ends. Raises what `chat_terminal` raises."""
        if self.input.isatty():
            self.interactive()
        else:
            self.piped()

    def interactive(self) -> None:
        with suppress(ImportError):  # none on Windows, where the console edits lines itself
            import readline  # noqa: F401  (imported, it gives input() line editing and history)
        self.notice("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
        while True:
            text = self._read_message()
            if text is None:
                return
            try:
                if text.strip() and self._run(text):
                    return
            except KeyboardInterrupt:  # the second one within an answer
                return
            except Exception as error:
                if isinstance(error, BrokenPipeError):  # nobody reads any more
                    raise
                self.notice(_one_line(error))

    def piped(self) -> None:
        failures: list[Exception] = []
        for number, line in enumerate(self._lines(), start=1):
            text = line.rstrip("\r\n")
            if not text.strip():
                continue
            self.notice(PROMPT + printable(text))
            try:
                if self._run(text):
                    break
            except Exception as error:
                if isinstance(error, BrokenPipeError):  # nobody reads any more
                    raise
                failures.append(error)
                self.notice(f"line {number}: {_one_line(error)}")
        if failures:
            kind = InputError if all(isinstance(error, InputError) for error in failures) else CourseError
            raise kind(f"standard input: {len(failures)} of its lines failed; the first: {_one_line(failures[0])}")

    def _lines(self) -> Iterator[str]:
        try:
            for line in iter(self.input.readline, ""):
                yield line.removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise InputError(f"standard input: not UTF-8 ({error.reason}); convert it with iconv") from None

    def _read_message(self) -> str | None:
        """Read one message; a line that ends with a backslash goes on in the next. None: the user leaves."""
        lines: list[str] = []
        try:
            lines.append(self._read_line(PROMPT))
            while lines[-1].endswith("\\"):
                lines[-1] = lines[-1][:-1]
                lines.append(self._read_line(CONTINUED))
        except (EOFError, KeyboardInterrupt, OSError):  # OSError: the terminal itself is gone
            with suppress(OSError):
                self.notice("")
            return None
        except UnicodeDecodeError as error:
            self.notice(f"that line is not UTF-8 ({error.reason}); set the terminal to UTF-8")
            return ""
        return "\n".join(lines)

    def _read_line(self, prompt: str) -> str:
        if self.input is sys.stdin and sys.stdout.isatty():
            return input(prompt)
        self._write_notice(prompt)
        line = self.input.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def _run(self, text: str) -> bool:
        """Run a command or answer a question; return whether to leave. `/word …` is a command, unless a space stands before it."""
        command = re.fullmatch(r"(/\w*)(?:\s+(.*))?", text, re.DOTALL)
        if not command:
            self.answer(text)
            return False
        name, argument = command[1].lower(), (command[2] or "").strip()
        if name == "/exit":
            return True
        if name not in _COMMANDS:
            raise InputError(f"command {name} is unknown{did_you_mean(name, _COMMANDS)} (/help lists them)")
        _COMMANDS[name].run(self, argument)
        return False

    def answer(self, text: str) -> None:
        gone = self.session.trimmed_turns
        with interrupt_stops(self.session) if self.input.isatty() else nullcontext():
            _write_answer(self.session, text, self.output)
        gone = self.session.trimmed_turns - gone
        if gone:
            self.notice(f"[the oldest {gone} turns no longer fit into the context of {self.session.context} tokens]")
        stats = self.session.last_stats
        if stats and stats.stopped == "length":
            self.notice(f"[cut off at max_new_tokens {stats.new_tokens}]")
        elif stats and stats.stopped == "stop":
            self.notice("[stopped]")

    def help(self, argument: str) -> None:
        for command in _COMMANDS.values():
            self.notice(f"{command.usage:<14}{command.does}")
        self.notice(
            "A line that ends with a backslash goes on in the next. A question that begins with / needs a space before it."
        )

    def reset(self, argument: str) -> None:
        self.session.reset()
        self.notice("[the conversation starts anew]")

    def system(self, argument: str) -> None:
        if not argument:
            raise InputError(f"/system needs a text; now it is {self.session.system!r}")
        self.session.set_system(argument)
        self.notice("[the conversation starts anew with this system turn]")

    def save(self, argument: str) -> None:
        if not argument:
            raise InputError("/save needs a file name, as in /save chat.jsonl")
        self.notice(f"[saved to {self.session.save(argument)}]")

    def stats(self, argument: str) -> None:
        stats = self.session.last_stats
        if stats is None:
            self.notice("no answer yet")
            return
        ended = {"end": "the model ended it", "length": "cut off at max_new_tokens", "stop": "stopped"}[stats.stopped]
        self.notice(
            f"last answer: {stats.prompt_tokens} prompt tokens, {stats.new_tokens} new tokens in {stats.seconds:.1f} s "
            f"({stats.tokens_per_second:.1f} tokens/s); {ended}"
        )
        limit = f" of {self.session.context}" if self.session.context else ""
        self.notice(
            f"conversation: {self.session.prompt_tokens()}{limit} tokens, {self.session.trimmed_turns} turns trimmed"
        )

    def notice(self, line: str) -> None:
        self._write_notice(line + "\n")

    def _write_notice(self, text: str) -> None:
        write(self.notices, text)


@dataclass(frozen=True)
class _Command:
    usage: str
    does: str
    run: Callable[[TerminalChat, str], None]


_COMMANDS = {
    "/help": _Command("/help", "this list", TerminalChat.help),
    "/reset": _Command("/reset", "forget the conversation, keep the system turn", TerminalChat.reset),
    "/system": _Command("/system TEXT", "start anew with this system turn", TerminalChat.system),
    "/save": _Command("/save FILE", "write the conversation as one line of JSONL", TerminalChat.save),
    "/stats": _Command("/stats", "tokens and speed of the last answer", lambda chat, argument: chat.stats(argument)),
    "/exit": _Command("/exit", "leave; so does Ctrl-D", lambda chat, argument: None),
}


class Stoppable(Protocol):
    """What writes an answer that can be ended."""

    def stop(self) -> None:
        """End the answer; from a signal handler."""


@contextmanager
def interrupt_stops(session: Stoppable) -> Iterator[None]:
    """Ctrl-C ends the answer, a second one the chat. Only the main thread receives signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def stop(signum: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        session.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _write_answer(session: ChatSession, text: str, output: TextIO) -> None:
    pieces = session.stream(text)
    last = ""
    with closing(pieces):
        try:
            for last in printable_pieces(pieces):
                write(output, last)
        finally:  # what comes next begins on a line of its own
            if not last.endswith("\n"):
                write(output, "\n")


def write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
    except UnicodeEncodeError:  # a terminal of another encoding than UTF-8
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, errors="replace").decode(encoding))
    stream.flush()


def _one_line(error: Exception) -> str:
    text = " ".join(printable(str(error)).split())
    return text if isinstance(error, CourseError) else f"the model failed: {type(error).__name__}: {text}"
