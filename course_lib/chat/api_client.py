"""Answers of a server with OpenAI's chat API, read by a thread, so that whoever shows them can look up and stop at any time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from course_lib.errors import CourseError, InputError

SECONDS_TO_CONNECT = 5
SECONDS_TO_ANSWER = 600  # between two pieces: the line may be long


def check_url(url: str) -> str:
    """Return the URL of a server without the last slash.

    Raises:
        InputError: it is none.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good:
        raise InputError(f"{url!r} is no server's address; it has the form http://127.0.0.1:8000/v1")
    return url.rstrip("/")


def list_models(url: str, api_key: str) -> list[str]:
    """The names of the models that a server has.

    Raises:
        CourseError: it does not answer, refuses the key, or has none.
    """
    import openai

    try:
        with _client(openai.OpenAI, url, api_key) as client:
            names = [model.id for model in client.models.list()]
    except Exception as error:
        raise told(error, url) from error
    if not names:
        raise CourseError(f"the server at {url} lists no model")
    return names


def told(error: Exception, url: str) -> CourseError:
    """What went wrong between here and the server, in one line."""
    import openai

    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        return CourseError(f"the server at {url} refuses the API key; give the right one, here or as COURSE_API_KEY")
    if isinstance(error, openai.APITimeoutError):
        return CourseError(f"the server at {url} does not answer in time")
    if isinstance(error, openai.APIConnectionError):
        return CourseError(f"no server answers at {url}; start one with: course serve MODEL")
    body = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, Mapping) else None
    status = getattr(error, "status_code", None)
    if status == 404 and said is None:
        return CourseError(f"at {url} is a server, but none with OpenAI's API; such an address often ends in /v1")
    return CourseError(f"the server says: {said or ' '.join(str(error).split()) or type(error).__name__}")


class ApiAnswer:
    """One answer from a server: `with` it, iterate over `pieces`; leaving ends it there too."""

    def __init__(
        self, url: str, api_key: str, *, model: str, messages: Sequence[Mapping[str, Any]], **sampling: Any
    ) -> None:
        self._url, self._key = url, api_key
        self._request: dict[str, Any] = {"model": model, "messages": list(messages), "stream": True, **sampling}
        self._pieces: SimpleQueue[str | Exception | None] = SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="api answer", daemon=True)

    def __enter__(self) -> ApiAnswer:
        self._reading = self._loop.create_task(self._read())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(RuntimeError):  # the loop is closed: all was read
            self._loop.call_soon_threadsafe(self._reading.cancel)
        self._thread.join()

    def pieces(self, *, patience: float) -> Iterator[str]:
        """Yield the pieces of the answer as they come, and an empty one whenever nothing came for `patience` seconds.

        Raises:
            CourseError: the server does not answer, refuses, or breaks off.
        """
        while True:
            try:
                piece = self._pieces.get(timeout=patience)
            except Empty:
                piece = ""
            if piece is None:
                return
            if isinstance(piece, Exception):
                raise told(piece, self._url) from piece
            yield piece

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(asyncio.wait([self._reading]))
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    async def _read(self) -> None:
        import openai

        try:
            async with (
                _client(openai.AsyncOpenAI, self._url, self._key) as client,
                await client.chat.completions.create(**self._request) as stream,
            ):
                async for chunk in stream:
                    if chunk.choices and (piece := chunk.choices[0].delta.content):
                        self._pieces.put(piece)
            self._pieces.put(None)
        except Exception as error:
            self._pieces.put(error)


def _client(kind: Any, url: str, api_key: str) -> Any:
    """A client that asks once."""
    import openai

    timeout = openai.Timeout(SECONDS_TO_ANSWER, connect=SECONDS_TO_CONNECT)
    return kind(base_url=url, api_key=api_key or "none", max_retries=0, timeout=timeout)
