"""Answers of a server with OpenAI's chat API, read by a thread: whoever shows one can look up, go, come again, and stop it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from course_lib.errors import CourseError, InputError

if TYPE_CHECKING:
    from openai.types.chat.chat_completion_chunk import ChoiceDelta

    from course_lib.agent.events import Event
    from course_lib.data.conversation import Message

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
    """One answer from a server, asked for at once: `text` is what came of it, `failure` why no more comes.

    `calls` are the tool calls of the turn, each its name and its arguments as JSON text; complete when it has ended.
    """

    def __init__(
        self, url: str, api_key: str, *, model: str, messages: Sequence[Mapping[str, Any]], **sampling: Any
    ) -> None:
        self.text = ""
        self.calls: list[dict[str, str]] = []
        self.steps: list[Event] = []  # an agent has some
        self.failure: CourseError | None = None
        self._url, self._key = url, api_key
        self._request: dict[str, Any] = {"model": model, "messages": list(messages), "stream": True, **sampling}
        self._ended = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._reading = self._loop.create_task(self._read())
        threading.Thread(target=self._run, name="api answer", daemon=True).start()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for its end, at most so long; return whether it has ended."""
        return self._ended.wait(seconds)

    def stop(self) -> None:
        """Break off, which the server sees, and so ends the answer there."""
        with suppress(RuntimeError):  # the loop is closed: it has ended
            self._loop.call_soon_threadsafe(self._reading.cancel)

    def messages(self) -> list[Message]:
        """The question and what came of the answer; nothing where nothing came."""
        return [self._request["messages"][-1], {"role": "assistant", "content": self.text}] if self.text else []

    def _take(self, delta: ChoiceDelta) -> None:
        self.text += delta.content or ""
        for part in delta.tool_calls or ():  # a server may send a call in parts
            while len(self.calls) <= part.index:
                self.calls.append({"name": "", "arguments": ""})
            if part.function is not None:
                self.calls[part.index]["name"] += part.function.name or ""
                self.calls[part.index]["arguments"] += part.function.arguments or ""

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(asyncio.wait([self._reading]))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()
            self._ended.set()

    async def _read(self) -> None:
        import openai

        try:
            async with (
                _client(openai.AsyncOpenAI, self._url, self._key) as client,
                await client.chat.completions.create(**self._request) as stream,
            ):
                async for chunk in stream:
                    if chunk.choices:
                        self._take(chunk.choices[0].delta)
        except Exception as error:
            broken = isinstance(error, openai.APIConnectionError) and self.text
            self.failure = (
                CourseError(f"the connection to {self._url} broke off in mid-answer")
                if broken
                else told(error, self._url)
            )


def _client(kind: Any, url: str, api_key: str) -> Any:
    """A client that asks once."""
    import openai

    timeout = openai.Timeout(SECONDS_TO_ANSWER, connect=SECONDS_TO_CONNECT)
    return kind(base_url=url, api_key=api_key or "none", max_retries=0, timeout=timeout)
