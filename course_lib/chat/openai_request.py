"""A request of OpenAI's chat API, read: honoured, or refused with a reason; nothing in it is ignored that would change the answer.

Source of the form: https://platform.openai.com/docs/api-reference/chat/create. `top_k` and `repetition_penalty` are names that vLLM
added to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from course_lib.chat.generation import SamplingSettings
from course_lib.data.conversation import Message, RowError, Tool, conversation, json_type, shown
from course_lib.data.formats_chat import read_messages
from course_lib.data.formats_tools import read_tools
from course_lib.errors import InputError, did_you_mean

MOST_STOP_TEXTS = 16
LONGEST_STOP_TEXT = 200  # characters
_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
_READ = {
    *_SAMPLING,
    *(
        "messages",
        "model",
        "max_tokens",
        "max_completion_tokens",
        "stop",
        "stream",
        "stream_options",
        "tools",
        "tool_choice",
    ),
}
# What only the operator of a server wants to know; the answer is the same without it.
_WITHOUT_EFFECT = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    "verbosity",
}
# Keys that are accepted at the value that asks for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "parallel_tool_calls": (True,),
    **dict.fromkeys(("functions", "function_call", "audio", "prediction", "web_search_options", "min_p"), ()),
}


class RequestError(Exception):
    """A request is refused: HTTP status, message, the key at fault and OpenAI's code for it."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class ChatRequest:
    """What is asked. `max_tokens` None: as many as the server gives unasked."""

    messages: list[Message]
    tools: list[Tool]
    sampling: dict[str, Any]
    max_tokens: int | None
    stop_texts: tuple[str, ...]
    stream: bool
    include_usage: bool

    def settings(self, most_tokens: int) -> SamplingSettings:
        """How tokens are chosen, at most so many."""
        return SamplingSettings(max_new_tokens=most_tokens, **self.sampling)


def read_request(body: bytes, *, served: str) -> ChatRequest:
    """Read the body of a request for the model that is served under that name.

    Raises:
        RequestError: it is not a request in OpenAI's form, or asks for what this server cannot do.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON ({error})") from None
    if not isinstance(request, dict):
        raise RequestError(f"the body is {json_type(request)}, not an object with messages")
    request = {key: value for key, value in request.items() if value is not None}
    _check_keys(request)
    if (model := request.get("model", served)) != served:
        raise RequestError(
            f"model {shown(model)} is not served here; ask for {served!r}",
            status=404,
            param="model",
            code="model_not_found",
        )
    messages, tools = _read_conversation(request)
    options = request.get("stream_options", {})
    if not isinstance(options, dict):
        raise RequestError(f"stream_options is {json_type(options)}, not an object", param="stream_options")
    asked = ChatRequest(
        messages=messages,
        tools=tools,
        sampling={key: request[key] for key in _SAMPLING if key in request},
        max_tokens=_read_max_tokens(request),
        stop_texts=_read_stop(request.get("stop", [])),
        stream=_read_flag(request, "stream"),
        include_usage=_read_flag(options, "include_usage"),
    )
    try:
        asked.settings(1)
    except InputError as error:
        raise RequestError(str(error).removeprefix("sampling: ")) from None
    return asked


def _check_keys(request: Mapping[str, Any]) -> None:
    for key, value in request.items():
        if key in _READ or key in _WITHOUT_EFFECT or value in _NEUTRAL.get(key, ()):
            continue
        if key in _NEUTRAL:
            raise RequestError(f"{key} {shown(value)} is not supported by this server; leave it out", param=key)
        hint = did_you_mean(key, _READ)
        raise RequestError(f"{shown(key)} is unknown{hint or '; leave it out'}", param=key)


def _read_conversation(request: Mapping[str, Any]) -> tuple[list[Message], list[Tool]]:
    turns = request.get("messages", [])
    if not isinstance(turns, list):
        raise RequestError(f"messages is {json_type(turns)}, not an array", param="messages")
    if not turns:
        raise RequestError("messages is empty; send at least one user message", param="messages")
    choice = request.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise RequestError(
            f"tool_choice {shown(choice)} is not supported by this server; choose auto or none", param="tool_choice"
        )
    try:
        messages = read_messages(turns, [])
        tools = read_tools(request.get("tools"), "tools", []) if choice == "auto" else []
        answer: Message = {"role": "assistant", "content": "the answer"}  # the form asks for one
        conversation([*messages, answer], tools=tools)
    except RowError as error:
        raise RequestError(str(error), param="messages") from None
    last = messages[-1]
    if last["role"] not in ("user", "tool"):
        raise RequestError(f"the last message is from {last['role']}; it must be from user or tool", param="messages")
    if last["role"] == "user" and not last["content"].strip():
        raise RequestError("the message is empty; write a question", param="messages")
    return messages, tools


def _read_max_tokens(request: Mapping[str, Any]) -> int | None:
    """OpenAI's newer name for it goes before the older."""
    key = "max_completion_tokens" if "max_completion_tokens" in request else "max_tokens"
    value = request.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise RequestError(f"{key} is {shown(value)}; it must be a whole number from 1 up", param=key)
    return value


def _read_stop(stop: Any) -> tuple[str, ...]:
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise RequestError(f"stop is {shown(stop)}; it must be a text or an array of texts, none empty", param="stop")
    if len(texts) > MOST_STOP_TEXTS or any(len(text) > LONGEST_STOP_TEXT for text in texts):
        raise RequestError(
            f"stop holds {len(texts)} texts, the longest of {max(map(len, texts))} characters; at most {MOST_STOP_TEXTS} of "
            f"{LONGEST_STOP_TEXT} are read",
            param="stop",
        )
    return tuple(texts)


def _read_flag(holder: Mapping[str, Any], key: str) -> bool:
    value = holder.get(key)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{key} is {shown(value)}; it must be true or false", param=key)
    return bool(value)
