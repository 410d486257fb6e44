"""A model behind OpenAI's chat API: `/v1/chat/completions`, `/v1/models`, `/health`.

Built of what `transformers serve` is built of (Starlette, uvicorn, `generate`), but not of its handlers (`transformers.cli.serving`, seen in 5.23).
They render with the tokenizer's template whatever an adapter was trained with, and let what people write become special tokens;
refuse `stream_options`; leave a stop text in the answer; seed the generators of the process when a request comes, not when its turn
comes; and have one path for clients that stream, which can be cancelled, and another for those that do not, which cannot. Here
an answer is what `ChatSession` would give: `encode_prompt` and `Generation`.

One answer is written at a time, the others wait in line: exact and bounded. Many users at once are for vLLM (`--engine vllm`).
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from course_lib.chat.answer_queue import Answer, AnswerQueue, Closed, QueueFull
from course_lib.chat.generation import SamplingSettings
from course_lib.chat.openai_request import ChatRequest, RequestError, read_request
from course_lib.chat.served import Served

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

LARGEST_BODY = 8 * 2**20  # bytes
SECONDS_TO_SEND = 30  # a client's time for its request
SECONDS_TO_READ = 60  # and for taking what it was sent
SIGN_OF_LIFE_SECONDS = 10.0  # to a stream on which nothing else comes
_FINISH = {"end": "stop", "length": "length", "stop": "stop"}


def build_app(
    served: Served,
    queue: AnswerQueue,
    *,
    api_key: str | None = None,
    own_names: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda line: None,
) -> ASGIApp:
    """The ASGI application.

    Args:
        api_key: what clients must send; None admits everybody.
        own_names: names by which a client without key may call this host; a page of a foreign site whose name was pointed here
            gives its own. Empty: any.
        say: gets one line on each answer, without its words.
    """
    preparing = ThreadPoolExecutor(
        1, thread_name_prefix="prepare"
    )  # one tokenizer, and a long prompt must not hold the loop

    async def complete(request: Request) -> ASGIApp:
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            raise RequestError("send the request as content-type application/json", status=415)
        return _Completion(request, served, queue, preparing, say)

    def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(served)]})

    def model(request: Request) -> Response:
        if request.path_params["name"] != served.name:
            raise RequestError(f"the model served here is {served.name!r}", status=404, code="model_not_found")
        return JSONResponse(_model(served))

    def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", complete, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
        ],
        exception_handlers={
            RequestError: _refused,
            HTTPException: _refused,
            ClientDisconnect: lambda request, error: Response(status_code=499),  # nobody reads it
            Exception: lambda request, error: _error_response(_failure(error)),
        },
    )
    return _guarded(app, api_key=api_key, own_names=own_names)


def _model(served: Served) -> dict[str, Any]:
    entry = {"id": served.name, "object": "model", "created": served.started, "owned_by": "course"}
    return entry | {"max_model_len": served.context}  # vLLM's name for it


def _guarded(app: ASGIApp, *, api_key: str | None, own_names: tuple[str, ...]) -> ASGIApp:
    """Let through who has the key; without one, who calls this host by a name of its own. /health is open to all."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health":
            await app(scope, receive, send)
            return
        request = Request(scope)
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        answer = app
        if api_key is not None:
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), api_key.encode()):
                said = "the API key is wrong" if key else "this server asks for an API key"
                answer = _error_response(
                    RequestError(f"{said}; send Authorization: Bearer KEY", status=401, code="invalid_api_key")
                )
        elif own_names and (host := _without_port(request.headers.get("host", ""))) not in own_names:
            answer = _error_response(RequestError(f"this server is not called {host!r}", status=403))
        await answer(scope, receive, send)

    return guarded


def _without_port(host: str) -> str:
    return re.sub(r":\d*$", "", host)


def _error_response(error: RequestError, *, retry_after: int | None = None) -> JSONResponse:
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body, status_code=error.status, headers=headers)


def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # of the router: no such path, no such method
        error = RequestError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
    assert isinstance(error, RequestError)
    return _error_response(error)


class _Completion:
    """One request for an answer, from its body to its last byte; whoever leaves meanwhile ends it."""

    def __init__(
        self,
        request: Request,
        served: Served,
        queue: AnswerQueue,
        preparing: ThreadPoolExecutor,
        say: Callable[[str], None],
    ) -> None:
        self.request, self.served, self.queue, self.preparing, self.say = request, served, queue, preparing, say
        self.base = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": served.name}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self.queue.place():
                await self._in_place(scope, receive, send)
        except QueueFull as full:
            refusal = RequestError(f"too many clients: {full}", status=429, code="rate_limit_exceeded")
            await _error_response(refusal, retry_after=full.retry_after)(scope, receive, send)

    async def _in_place(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked, prompt, sampling = await self._read()
        try:
            answer = self.queue.ask(partial(self.served.generation, asked, prompt, sampling))
        except Closed as error:
            raise RequestError(str(error), status=503) from None
        sending = self._stream if asked.stream else self._whole
        writing = asyncio.create_task(sending(asked, answer, len(prompt), scope, receive, send))
        leaving = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone = not writing.done()
            answer.cancel()
            writing.cancel()
            leaving.cancel()
            await asyncio.wait({writing, leaving, answer.writing})
            self._report(answer, len(prompt), gone=gone)
        if not writing.cancelled() and (error := writing.exception()) is not None:
            raise error

    async def _read(self) -> tuple[ChatRequest, list[int], SamplingSettings]:
        body = bytearray()
        try:
            async with asyncio.timeout(SECONDS_TO_SEND):
                async for chunk in self.request.stream():
                    body += chunk
                    if len(body) > LARGEST_BODY:
                        raise RequestError(f"the request is larger than {LARGEST_BODY} bytes", status=413)
        except TimeoutError:
            raise RequestError(f"the request did not arrive within {SECONDS_TO_SEND} s", status=408) from None

        def prepare() -> tuple[ChatRequest, list[int], SamplingSettings]:
            asked = read_request(bytes(body), served=self.served.name)
            return asked, *self.served.prompt(asked)

        return await asyncio.get_running_loop().run_in_executor(self.preparing, prepare)

    async def _whole(
        self, asked: ChatRequest, answer: Answer, prompt_tokens: int, scope: Scope, receive: Receive, send: Send
    ) -> None:
        reader = self.served.reader(asked)
        try:
            text = "".join([reader.words(piece) async for piece in answer.pieces()])
        except Exception as error:
            await _error_response(_failure(error))(scope, receive, send)
            return
        rest, calls = reader.end()
        message: dict[str, Any] = {"role": "assistant", "content": text + rest}
        if calls:
            message |= {"content": message["content"] or None, "tool_calls": calls}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else _finish(answer)}
        body = {**self.base, "object": "chat.completion", "choices": [choice], "usage": _usage(answer, prompt_tokens)}
        await JSONResponse(body)(scope, receive, send)

    async def _stream(
        self, asked: ChatRequest, answer: Answer, prompt_tokens: int, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Server-sent events, https://html.spec.whatwg.org/multipage/server-sent-events.html: a line `data: JSON` each."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with aclosing(self._events(asked, answer, prompt_tokens)) as events:
            async for event in events:
                async with asyncio.timeout(SECONDS_TO_READ):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self, asked: ChatRequest, answer: Answer, prompt_tokens: int) -> AsyncIterator[bytes]:
        def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            return _event({**self.base, "object": "chat.completion.chunk", "choices": [choice]})

        reader = self.served.reader(asked)
        yield chunk({"role": "assistant", "content": ""})
        try:
            async for piece in answer.pieces(patience=SIGN_OF_LIFE_SECONDS):
                if words := reader.words(piece):
                    yield chunk({"content": words})
                elif not piece:
                    yield b": waiting\n\n"
        except Exception as error:
            yield _event(_failure(error).body)
            return
        rest, calls = reader.end()
        if rest:
            yield chunk({"content": rest})
        if calls:
            yield chunk({"tool_calls": [{"index": index, **call} for index, call in enumerate(calls)]})
        yield chunk({}, "tool_calls" if calls else _finish(answer))
        if asked.include_usage:
            usage = _usage(answer, prompt_tokens)
            yield _event({**self.base, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    def _report(self, answer: Answer, prompt_tokens: int, *, gone: bool) -> None:
        written = answer.generation
        if written is None:
            self.say("a client left before its turn came")
            return
        end = "its client left" if gone else {"end": "the model ended it"}.get(written.ending, written.ending)
        self.say(f"{prompt_tokens} prompt tokens, {written.new_tokens} new tokens in {written.seconds:.1f} s; {end}")


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def _finish(answer: Answer) -> str:
    assert answer.generation is not None
    return _FINISH[answer.generation.ending]


def _usage(answer: Answer, prompt_tokens: int) -> dict[str, int]:
    assert answer.generation is not None
    new = answer.generation.new_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": new, "total_tokens": prompt_tokens + new}


def _failure(error: Exception) -> RequestError:
    """What a client is told when no answer comes."""
    if isinstance(error, Closed):
        return RequestError(str(error), status=503)
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return RequestError("memory ran out; ask for fewer tokens", status=500)
    said = " ".join(str(error).split())
    return RequestError(f"the model failed: {type(error).__name__}: {said}", status=500)
