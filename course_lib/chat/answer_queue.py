"""Many clients, one model: who waits, who is answered, and who is turned away. Everything but the model runs on the event loop.

One answer is written at a time, in the order of asking, so memory is that of one answer however many ask. Nobody's leaving or
slow reading holds up the others.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

from course_lib.chat.generation import Generation

MOST_WAIT_SECONDS = 60  # what a client is told to wait at most before it asks again


class QueueFull(Exception):
    """As many clients are here as may be; try again in `retry_after` seconds."""

    def __init__(self, here: int, retry_after: int) -> None:
        super().__init__(f"{here} clients are being answered or wait; ask again in {retry_after} s")
        self.retry_after = retry_after


class Closed(Exception):
    """The server is being stopped."""


class AnswerQueue:
    """One answer at a time, and at most `waiting` clients beside the one that is answered."""

    def __init__(self, *, waiting: int) -> None:
        self._turn = asyncio.Lock()  # first come, first served
        self._places, self._here = 1 + waiting, 0
        self._answers: set[Answer] = set()
        self._seconds: deque[float] = deque([1.0], maxlen=8)  # of the last answers
        self._closed = False

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for one client, from its coming to its going.

        Raises:
            QueueFull: there is none.
        """
        if self._here >= self._places:
            wait = self._here * sum(self._seconds) / len(self._seconds)
            raise QueueFull(self._here, min(max(math.ceil(wait), 1), MOST_WAIT_SECONDS))
        self._here += 1
        try:
            yield
        finally:
            self._here -= 1

    def ask(self, begin: Callable[[], Generation]) -> Answer:
        """Have an answer written when its turn comes; `begin` is called then.

        Raises:
            Closed: the server is being stopped.
        """
        if self._closed:
            raise Closed("the server is being stopped")
        answer = Answer(begin, self._turn)
        self._answers.add(answer)
        answer.writing.add_done_callback(lambda _: self._ended(answer))
        return answer

    def close(self) -> None:
        """End all answers, each with `Closed`."""
        self._closed = True
        for answer in self._answers:
            answer.cancel(Closed("the server is being stopped"))

    def _ended(self, answer: Answer) -> None:
        self._answers.discard(answer)
        if answer.generation is not None:
            self._seconds.append(answer.generation.seconds)


class Answer:
    """One client's answer. `generation` is None while it waits, and tells of tokens and seconds afterwards."""

    def __init__(self, begin: Callable[[], Generation], turn: asyncio.Lock) -> None:
        self.generation: Generation | None = None
        self._pieces: asyncio.Queue[str | None] = (
            asyncio.Queue()
        )  # no longer than max_tokens, however slowly it is read
        self._error: Exception | None = None
        self.writing = asyncio.create_task(self._write(begin, turn))
        self.writing.add_done_callback(lambda _: self._pieces.put_nowait(None))

    async def pieces(self, *, patience: float | None = None) -> AsyncIterator[str]:
        """The pieces of the answer as they come; an empty one whenever nothing came for `patience` seconds.

        Raises:
            Closed: the server is being stopped.
            Exception: whatever the model raised.
        """
        while True:
            try:
                async with asyncio.timeout(patience):
                    piece = await self._pieces.get()
            except TimeoutError:
                piece = ""
            if piece is None:
                break
            yield piece
        if self._error is not None:
            raise self._error

    def cancel(self, reason: Exception | None = None) -> None:
        """End it within a token, or before it has begun; the reader gets `reason`."""
        self._error = self._error or reason
        if not self.writing.cancelling():  # a second time would not wait for the model
            self.writing.cancel()

    async def _write(self, begin: Callable[[], Generation], turn: asyncio.Lock) -> None:
        try:
            async with turn:
                self.generation = begin()
                reading = asyncio.create_task(
                    asyncio.to_thread(self._read, self.generation, asyncio.get_running_loop())
                )
                try:
                    await asyncio.shield(reading)
                finally:  # the turn passes on when the model is free, not before
                    self.generation.stop()
                    await asyncio.wait([reading])
        except Exception as error:
            self._error = error

    def _read(self, generation: Generation, loop: asyncio.AbstractEventLoop) -> None:
        try:
            for piece in generation:
                loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
        finally:
            generation.close()
