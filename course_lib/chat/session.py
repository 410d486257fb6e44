"""A conversation with a model: its history, what of it fits into the context, and answers that stream."""

from __future__ import annotations

import json
import weakref
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from course_lib.chat.generation import Ending, Generation, SamplingSettings, stop_ids
from course_lib.chat.history import system_text, take_back_question
from course_lib.data.conversation import Conversation, Message, RowError, Tool
from course_lib.data.templates import choose_template
from course_lib.data.tokenize import encode_prompt
from course_lib.errors import CourseError, InputError
from course_lib.files import file_to_write, write_text

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class AnswerStats:
    """One answer in numbers. `seconds` counts reading the prompt too; `stopped` is end (by the model), length, or stop (by the user)."""

    prompt_tokens: int
    new_tokens: int
    seconds: float
    tokens_per_second: float
    stopped: Ending


class ChatSession:
    """A conversation of several turns. Change `sampling` at any time; it holds from the next question on.

    `messages` is the history the model sees, a system turn first if there is one. When a question does not fit into the context,
    the oldest questions go from it with their answers; `trimmed_turns` counts the messages that went.
    `last_stats` tells of the last answer.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str = "auto",
        system: str = "",
        sampling: SamplingSettings | None = None,
        context: int | None = None,
    ) -> None:
        """Start a conversation. `context` in tokens is the model's `max_position_embeddings` by default; without either, unlimited.

        Raises:
            InputError: unknown template, none at all for this tokenizer, or a context that is not positive.
        """
        if context is not None and context < 1:
            raise InputError(f"context is {context}; it must be a number of tokens from 1 up")
        self.model, self.tokenizer = model, tokenizer
        self.template = choose_template(tokenizer, template)
        self.sampling = sampling or SamplingSettings()
        self.context = context or getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.last_stats: AnswerStats | None = None
        self._stop_ids = stop_ids(model, self.template, tokenizer)
        self._generation: Generation | None = None  # what stop() stops
        # Weak, so that leaving a loop over the stream still closes it.
        self._unfinished: weakref.ref[Generator[str, None, None]] | None = None
        self._start(system)

    def stream(self, text: str) -> Generator[str, None, None]:
        """Ask, and yield pieces of the answer as they come; both turns join the history when the iterator ends.

        An answer that is stopped or no longer read joins as far as it was read. An exception in the model is raised here and
        leaves the history as it was.

        Raises:
            InputError: at once: the message is empty, no valid Unicode, refused by the template, or too long for the context.
            CourseError: at once: another thread is reading an answer of this session.
        """
        self._close_unfinished()
        question = _question(text)
        history, prompt = self._fit(question)
        self._generation = Generation(
            self.model, self.tokenizer, prompt, stop_ids=self._stop_ids, sampling=self.sampling
        )
        answer = self._answer([*history, question], len(prompt), self._generation)
        self._unfinished = weakref.ref(answer)
        return answer

    def stream_turn(self, row: Conversation) -> Generator[str, None, None]:
        """Yield pieces of the next assistant turn of any conversation, with tools or without; the history has no part in it.

        With tools, special tokens are text as well, but for those that end a turn: some templates write calls with them.

        Raises:
            InputError: at once: the template refuses the conversation, or it is too long for the context.
            CourseError: at once: another thread is reading an answer of this session.
        """
        self._close_unfinished()
        prompt = self._encode(row["messages"], row.get("tools", ()))
        if not self._has_room_for(prompt):
            raise InputError(
                f"the conversation is too long: {len(prompt)} tokens, and max_new_tokens is {self.sampling.max_new_tokens}, but "
                f"the context is {self.context}; begin anew, or lower max_new_tokens"
            )
        hidden = self._stop_ids if row.get("tools") else None
        self._generation = Generation(
            self.model, self.tokenizer, prompt, stop_ids=self._stop_ids, sampling=self.sampling, hidden=hidden
        )
        turn = self._answer(None, len(prompt), self._generation)
        self._unfinished = weakref.ref(turn)
        return turn

    def fits(self, row: Conversation) -> bool:
        """Whether a conversation and an answer of `max_new_tokens` fit into the context. Raises InputError as `stream_turn`."""
        return self._has_room_for(self._encode(row["messages"], row.get("tools", ())))

    def ask(self, text: str) -> str:
        """Ask and return the whole answer. Raises what `stream` raises."""
        return "".join(self.stream(text))

    def stop(self) -> None:
        """End the answer being written within a token; from any thread or signal handler. Does nothing when there is none."""
        generation = self._generation
        if generation is not None:
            generation.stop()

    def reset(self) -> None:
        """Forget all but the system turn.

        Raises:
            CourseError: another thread is reading an answer of this session.
        """
        self._start(self.system)

    def set_system(self, text: str) -> None:
        """Start anew with another system turn; an empty text leaves it out. Raises as `reset`, and InputError as `stream`."""
        _check_unicode(text)
        self._start(text)

    def take_back(self) -> str:
        """Forget the last question and its answer, so that it can be asked again; return the question.

        Turns that it had pushed out of the context stay out.

        Raises:
            InputError: there is no question in the history.
            CourseError: another thread is reading an answer of this session.
        """
        self._close_unfinished()
        return take_back_question(self.messages)

    @property
    def new_tokens(self) -> int:
        """How many tokens the model has written of the answer that it is writing; 0 when it writes none."""
        return self._generation.new_tokens if self._generation else 0

    @property
    def system(self) -> str:
        """The system turn's text, empty when there is none."""
        return system_text(self.messages)

    def save(self, path: str | Path) -> Path:
        """Write the whole conversation, turns that no longer fit into the context included, as one `messages` row of a JSONL file.

        Raises:
            InputError: nothing was said yet, or something stands at `path` or it cannot be written.
            CourseError: the disk is full.
        """
        opening = self._opening()
        messages = [*opening, *self._trimmed, *self.messages[len(opening) :]]
        if len(messages) == len(opening):
            raise InputError(f"{path}: nothing to save, for nothing was said yet")
        path = file_to_write(Path(path).expanduser(), overwrite=False)
        write_text(path, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        return path

    def prompt_tokens(self) -> int:
        """How many tokens of the context the history takes, the header of the next answer included; 0 when it is empty.

        Raises:
            InputError: the template refuses the conversation.
        """
        return len(self._encode(self.messages)) if self.messages else 0

    @property
    def trimmed_turns(self) -> int:
        """How many messages no longer fitted into the context since the conversation began."""
        return len(self._trimmed)

    def _start(self, system: str) -> None:
        self._close_unfinished()
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._trimmed: list[Message] = []

    def _opening(self) -> list[Message]:
        return self.messages[:1] if self.system else []

    def _close_unfinished(self) -> None:
        """An iterator that is still held but no longer read counts as abandoned."""
        answer = self._unfinished() if self._unfinished else None
        if answer is not None:
            if answer.gi_running:
                raise CourseError("an answer is still being written; stop() it and wait for its end")
            answer.close()

    def _fit(self, question: Message) -> tuple[list[Message], list[int]]:
        """Return as much of the history as fits, and the prompt."""
        opening = self._opening()
        turns = self.messages[len(opening) :]
        while True:
            prompt = self._encode([*opening, *turns, question])
            if self._has_room_for(prompt):
                return [*opening, *turns], prompt
            if not turns:
                raise InputError(
                    f"the message is too long: {len(prompt)} tokens with system turn and template, and max_new_tokens is "
                    f"{self.sampling.max_new_tokens}, but the context is {self.context}; shorten it, or lower max_new_tokens"
                )
            second = (number for number, message in enumerate(turns) if number and message["role"] == "user")
            turns = turns[next(second, len(turns)) :]

    def _has_room_for(self, prompt: list[int]) -> bool:
        return self.context is None or len(prompt) + self.sampling.max_new_tokens <= self.context

    def _encode(self, messages: list[Message], tools: Sequence[Tool] = ()) -> list[int]:
        try:
            return encode_prompt(messages, self.template, self.tokenizer, tools)
        except RowError as error:
            raise InputError(f"this conversation cannot be rendered: {error}") from error

    def _answer(
        self, messages: list[Message] | None, prompt_tokens: int, generation: Generation
    ) -> Generator[str, None, None]:
        """Yield the answer; with `messages`, the turns before it, it joins the history."""
        pieces: list[str] = []
        abandoned = failed = False
        try:
            for piece in generation:
                pieces.append(piece)
                yield piece
        except (GeneratorExit, KeyboardInterrupt):
            abandoned = True
            raise
        except BaseException:
            failed = True
            raise
        finally:
            generation.close()
            self._generation = None
            if not failed:
                if messages is not None:
                    self._record([*messages, {"role": "assistant", "content": "".join(pieces)}])
                self.last_stats = AnswerStats(
                    prompt_tokens=prompt_tokens,
                    new_tokens=generation.new_tokens,
                    seconds=generation.seconds,
                    tokens_per_second=generation.new_tokens / max(generation.seconds, 1e-9),
                    stopped="stop" if abandoned else generation.ending,
                )

    def _record(self, messages: list[Message]) -> None:
        start = len(self._opening())
        gone = len(self.messages) + 2 - len(messages)
        self._trimmed += self.messages[start : start + gone]
        self.messages[:] = messages  # in place: a widget may hold the list


def _question(text: str) -> Message:
    if not text.strip():
        raise InputError("the message is empty; write a question")
    _check_unicode(text)
    return {"role": "user", "content": text}


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text is no valid Unicode: character {error.start + 1} is {text[error.start]!a}; use UTF-8"
        ) from None
