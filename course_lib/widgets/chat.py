"""A chat box in a notebook: one model, or several side by side, answering as they write."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import traitlets

from course_lib.errors import CourseError, InputError
from course_lib.files import file_to_write, write_text
from course_lib.widgets.base import CourseWidget, script
from course_lib.widgets.speakers import Speaker
from course_lib.widgets.transcript import Answer, Transcript, Turn, empty_answer, json_line, training_row

if TYPE_CHECKING:
    from course_lib.agent.runner import AgentRunner
    from course_lib.chat.session import ChatSession


class ChatWidget(CourseWidget):
    """Talk to a model, or ask several the same question: `ChatWidget(session)`, `ChatWidget({"before": a, "after": b})`.

    A side is a `ChatSession`, or an `AgentRunner`, whose thoughts, calls and results are folded in above its answer.

    Several answer one after the other, so each one's tokens a second are its own. In a notebook that runs from top to bottom,
    `ask()` first and show the widget afterwards, or show `transcript()` in a later cell: what is said later in the browser is
    not in the saved file.

    Buttons work while a cell runs, for an answer is written in a thread of its own and the browser's messages come in another
    one than the cell's; `_lock` guards all state, and is never held while a model computes.

    Raises:
        InputError: no session, the same one twice, or sessions that were asked different questions before.
    """

    _esm = script("chat.js")

    sides = traitlets.List(traitlets.Unicode()).tag(sync=True)
    turns = traitlets.List().tag(sync=True)  # of Turn
    live = traitlets.Dict().tag(
        sync=True
    )  # {"side": number, "answer": Answer} while one is written: the trait that streams
    settings = traitlets.Dict().tag(sync=True)  # system, temperature, max_new_tokens
    problem = traitlets.Unicode().tag(sync=True)  # why the last thing asked for was not done

    def __init__(self, session: ChatSession | AgentRunner | Mapping[str, ChatSession | AgentRunner]) -> None:
        sessions = dict(session) if isinstance(session, Mapping) else {"model": session}
        if not sessions:
            raise InputError('no model to talk to; give a ChatSession, or several by name: {"before": a, "after": b}')
        self._speakers = [Speaker(one) for one in sessions.values()]
        if len({id(speaker.session) for speaker in self._speakers}) < len(sessions):
            raise InputError(f"{', '.join(sessions)} share a session; make one for each, the model may be the same")
        self._lock = threading.RLock()
        self._stopping = False
        self._worker: threading.Thread | None = None
        super().__init__(sides=list(sessions), turns=_turns_so_far(list(sessions), self._speakers))
        self._show_settings()
        self.on_msg(self._receive)

    def ask(self, text: str) -> dict[str, str]:
        """Ask all sides and wait; return their answers by name. Interrupting the kernel stops the answers.

        Raises:
            InputError: at once, nothing is asked: the message is empty or too long for one of the models.
            CourseError: an answer is being written; or a model failed, all others have answered.
        """
        self._begin(text)
        return self.wait()

    def wait(self) -> dict[str, str]:
        """Wait until nothing is being written; return the last answers by name. Raises CourseError if a model failed."""
        worker = self._worker
        try:
            if worker is not None:
                worker.join()
        except KeyboardInterrupt:
            self.stop()
            raise
        answers = dict(zip(self.sides, self.turns[-1]["answers"], strict=True)) if self.turns else {}
        failed = [f"{side}: {answer['note']}" for side, answer in answers.items() if answer["state"] == "failed"]
        if failed:
            raise CourseError("; ".join(failed))
        return {side: answer["text"] for side, answer in answers.items()}

    def stop(self) -> None:
        """End what is being written, within a token; sides that have not begun are not asked. From any thread."""
        with self._lock:
            self._stopping = True
            for speaker in self._speakers:
                speaker.conversation.stop()

    def retry(self) -> None:
        """Take the last question back, with its answers, and ask it again; does not wait.

        Raises:
            InputError: nothing was asked, or the question no longer fits.
            CourseError: an answer is being written.
        """
        with self._lock:
            self._refuse_while_writing()
            if not self.turns:
                raise InputError("nothing to ask again; ask a question first")
            *earlier, last = self.turns
            for speaker, answer in zip(self._speakers, last["answers"], strict=True):
                if answer["messages"]:
                    speaker.conversation.take_back()
            self.turns = earlier
            try:
                self._begin(last["question"])
            except CourseError as error:  # the question stays to be seen, and can be tried again
                refused = {**empty_answer(), "state": "failed", "note": str(error)}
                self.turns = [*earlier, Turn(question=last["question"], answers=[refused for _ in self.sides])]
                raise

    def reset(self) -> None:
        """Forget what was said; the system prompt stays. Raises CourseError while an answer is being written."""
        with self._lock:
            self._refuse_while_writing()
            for speaker in self._speakers:
                speaker.conversation.reset()
            self.turns = []

    def configure(
        self, *, system: str | None = None, temperature: float | None = None, max_new_tokens: int | None = None
    ) -> None:
        """Change how all sides answer, from the next question on. Another system prompt starts the conversation anew.

        Raises:
            InputError: a value is out of its range; nothing is changed.
            CourseError: an answer is being written.
        """
        wanted = {"temperature": temperature, "max_new_tokens": max_new_tokens}
        changes = {name: value for name, value in wanted.items() if value is not None}
        with self._lock:
            self._refuse_while_writing()
            sampling = [replace(speaker.session.sampling, **changes) for speaker in self._speakers]
            if system is not None and any(speaker.conversation.system != system for speaker in self._speakers):
                for speaker in self._speakers:
                    speaker.conversation.set_system(system)
                self.turns = []
            for speaker, settings in zip(self._speakers, sampling, strict=True):
                speaker.session.sampling = settings
            self._show_settings()

    def transcript(self) -> Transcript:
        """What was said so far, finished answers only; as the last line of a later cell it stays in the saved notebook."""
        return Transcript(list(self.sides), [turn for turn in self.turns if not self._is_unfinished(turn)])

    def save(self, path: str | Path, *, side: str = "") -> Path:
        """Write one side's conversation as a `messages` row of a JSON Lines file, ready for training.

        Raises:
            InputError: `side` is none of the sides, or not named where there are several; nothing was said yet; something stands
                at `path`.
            CourseError: the disk is full.
        """
        line = self._line(side)
        path = file_to_write(Path(path).expanduser(), overwrite=False)
        write_text(path, line)
        return path

    def close(self) -> None:
        """Stop the answers and take the widget away."""
        if self.comm is not None:
            self.stop()
        super().close()

    def twin(self) -> str:
        """The transcript as it is now."""
        return self.transcript()._repr_html_()

    def __repr__(self) -> str:
        return f"ChatWidget: {', '.join(self.sides)}\n{self.transcript()}"

    def _begin(self, text: str) -> None:
        with self._lock:
            self._refuse_while_writing()
            # every session reads the question before any of them answers: all take it, or none
            streams = [speaker.conversation.stream(text) for speaker in self._speakers]
            self._stopping, self.problem = False, ""
            self.live = {"side": 0, "answer": empty_answer()}
            self.turns = [*self.turns, Turn(question=text, answers=[empty_answer() for _ in self.sides])]
            self._worker = threading.Thread(target=self._write, args=(text, streams), name="chat-widget", daemon=True)
            self._worker.start()

    def _write(self, question: str, streams: list[Generator[str, None, None]]) -> None:
        answers = [empty_answer() for _ in streams]
        try:
            for side, (speaker, stream) in enumerate(zip(self._speakers, streams, strict=True)):
                if self._stopping:
                    stream.close()
                    answers[side].update(state="cut", note="not asked: stopped before")
                    continue
                with self._lock, self.hold_sync():  # one message: the answer before must not be gone between two
                    self._show_turn(Turn(question=question, answers=[answer.copy() for answer in answers]))
                    self._show_live(side, answers[side])
                speaker.write(
                    stream,
                    answers[side],
                    stopping=lambda: self._stopping,
                    show=lambda side=side: self._show_live(side, answers[side]),
                )
        finally:
            with self._lock, self.hold_sync():
                self._show_turn(Turn(question=question, answers=answers))
                self.live = {}

    def _show_turn(self, turn: Turn) -> None:
        self.turns = [*self.turns[:-1], turn]

    def _show_live(self, side: int, answer: Answer) -> None:
        with self._lock:
            self.live = {"side": side, "answer": {**answer, "messages": []}}

    def _tell(self, problem: str) -> None:
        with self._lock:
            self.problem = problem

    def _show_settings(self) -> None:
        first, *others = self._speakers
        self.settings = {
            "system": first.conversation.system
            if all(other.conversation.system == first.conversation.system for other in others)
            else "",
            "temperature": first.session.sampling.temperature,
            "max_new_tokens": first.session.sampling.max_new_tokens,
        }

    def _refuse_while_writing(self) -> None:
        if self.live:
            raise CourseError("an answer is still being written; stop it, or wait for its end")

    def _is_unfinished(self, turn: Turn) -> bool:
        return any(answer["state"] in ("waiting", "writing") for answer in turn["answers"])

    def _line(self, side: str) -> str:
        if not side and len(self.sides) > 1:
            raise InputError(f"there are {len(self.sides)} conversations; name one with side=: {', '.join(self.sides)}")
        side = side or self.sides[0]
        if side not in self.sides:
            raise InputError(f"side {side!r} is none of {', '.join(self.sides)}")
        number = self.sides.index(side)
        speaker = self._speakers[number]
        row = training_row(self.transcript().turns, number, speaker.conversation.system, speaker.tools)
        if all(message["role"] == "system" for message in row["messages"]):
            raise InputError(f"nothing to save, for {side} has answered nothing yet")
        return json_line(row)

    def _receive(self, widget: Any, content: dict[str, Any], buffers: Any) -> None:
        """Do what a button asks; what cannot be done is one line in the widget."""
        try:
            self._tell("")
            if content["do"] == "ask":
                self._begin(content["text"])
            elif content["do"] == "configure":
                self.configure(**content["settings"])
            elif content["do"] == "save":
                self.send({"file": f"{content['side']}.jsonl", "text": self._line(content["side"])})
            else:
                {"stop": self.stop, "retry": self.retry, "reset": self.reset}[content["do"]]()
        except CourseError as error:
            self._tell(str(error))
        finally:
            self.send({"answered": content["do"]})  # or else the browser says that the kernel is silent


def _turns_so_far(sides: list[str], speakers: list[Speaker]) -> list[Turn]:
    first, *others = histories = [speaker.turns_so_far() for speaker in speakers]
    asked = [[turn["question"] for turn in turns] for turns in histories]
    if any(questions != asked[0] for questions in asked):
        raise InputError(
            f"{', '.join(sides)} were asked different questions before; reset() them, or start new sessions"
        )
    return [
        Turn(question=turns[0]["question"], answers=[turn["answers"][0] for turn in turns])
        for turns in zip(first, *others, strict=True)
    ]
