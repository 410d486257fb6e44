"""The one form every row is turned into: the Hugging Face / OpenAI `messages` list, or plain text.

Both kinds are a `Conversation`; a row has exactly one of `messages` and `text`:

| row | keys | what is trained |
|---|---|---|
| a conversation | `messages`, `tools`? | what the assistant wrote: answers and tool calls |
| plain text, for continued pre-training | `text` | every token, without a chat template |

Text must be valid Unicode: a lone surrogate (half of a UTF-16 pair, `"\\ud83d"` in JSON) has no UTF-8 form and no
tokenizer takes it, so such a row is refused. NUL and other control characters are valid Unicode and are kept: they are
data, and a byte-level tokenizer has tokens for them.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from course_lib.errors import did_you_mean

ROLES = ("system", "user", "assistant", "tool")
MAX_DEPTH = 100  # levels of nesting in tool schemas and arguments: more than any schema has, less than Python's stack


class CalledFunction(TypedDict):
    """The function an assistant calls; `arguments` is an object, not OpenAI's JSON text: chat templates write it out."""

    name: str
    arguments: dict[str, Any]


class ToolCall(TypedDict):
    """One call of an assistant turn. `type` is "function"."""

    id: NotRequired[str]
    type: str
    function: CalledFunction


class FunctionSchema(TypedDict):
    """A function the assistant may call; `parameters` is a JSON schema."""

    name: str
    description: NotRequired[str]
    parameters: NotRequired[dict[str, Any]]


class Tool(TypedDict):
    """OpenAI's form of a tool. `type` is "function"."""

    type: str
    function: FunctionSchema


class Message(TypedDict):
    """One turn. `train: False` on an assistant turn keeps it out of the loss.

    `tool_calls` stands on assistant turns only, and `content` may be empty beside it; a `tool` turn answers a call and may
    name it by `name` or `tool_call_id`. `reasoning_content` on an assistant turn is the thought before its answer; agent
    protocols write it, chat templates do not.
    """

    role: str
    content: str
    tool_calls: NotRequired[list[ToolCall]]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]
    reasoning_content: NotRequired[str]
    train: NotRequired[bool]


class Conversation(TypedDict, total=False):
    """Either `messages` in order (at most one system turn, first; then user, tool and assistant turns), with the `tools`
    the assistant may call if there are any; or `text` alone, every token of which is trained."""

    messages: list[Message]
    tools: list[Tool]
    text: str


class RowError(ValueError):
    """A row does not fit; the message is the reason alone. The reader adds file and row number."""


def conversation(messages: list[Message], *, tools: list[Tool] | None = None) -> Conversation:
    """Check the messages and the tools, and wrap them. No tools (None or an empty list): no key `tools`.

    Raises:
        RowError: no messages, an unknown role, content that is not text, a system turn that is not first, a tool or a
            tool call that is not in OpenAI's form, or no assistant turn with an answer or a tool call in it.
    """
    if not messages:
        raise RowError("no messages")
    for number, message in enumerate(messages, start=1):
        _check_message(message, number)
    for number, tool in enumerate(tools or [], start=1):
        _check_tool(tool, f"tool {number}")
    if not any(message["role"] == "assistant" and _says_something(message) for message in messages):
        raise RowError("no output: no assistant turn with an answer in it")
    return {"messages": messages, "tools": tools} if tools else {"messages": messages}


def plain_text(text: str) -> Conversation:
    """Check a text for continued pre-training, and wrap it.

    Raises:
        RowError: it is not text, not valid Unicode, or blank.
    """
    check_text(text, "'text'")
    if not text.strip():
        raise RowError("'text' is blank: nothing to train")
    return {"text": text}


def check_text(value: Any, where: str) -> str:
    """Return `value` if it is text of valid Unicode; control characters are kept.

    Raises:
        RowError: something else than text, or a lone surrogate (which one and where).
    """
    if not isinstance(value, str):
        raise RowError(f"{where} is {json_type(value)}, not text: {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"{where} has the lone surrogate U+{ord(value[error.start]):04X} at character {error.start + 1}: not valid Unicode"
        ) from None
    return value


_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlist, _short.maxdict = 1, 60, 60, 4, 4


def json_type(value: Any) -> str:
    """What JSON calls a value of this kind, for messages to people who wrote JSON and not Python."""
    if value is None:
        return "null"
    names: dict[type, str] = {bool: "true or false", str: "text", dict: "an object", list: "an array"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def shown(value: Any) -> str:
    """A value as an error shows it: on one line, at most 80 characters, whatever it is."""
    try:
        text = _short.repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _says_something(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def _check_message(message: Any, number: int) -> None:
    if not isinstance(message, Mapping):
        raise RowError(
            f"message {number} is {json_type(message)}, not an object with role and content: {shown(message)}"
        )
    role = message.get("role")
    if role not in ROLES:
        hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        raise RowError(f"message {number}: unknown role {shown(role)} (known: {', '.join(ROLES)}){hint}")
    where = f"message {number} ({role})"
    check_text(message.get("content"), f"{where}: content")
    for key in ("name", "tool_call_id", "reasoning_content"):
        if key in message:
            check_text(message[key], f"{where}: {key}")
    if not isinstance(message.get("train", True), bool):
        raise RowError(f"{where}: train is {shown(message['train'])}, not true or false")
    if role == "system" and number > 1:
        raise RowError(f"message {number}: a system turn must come first")
    if "tool_calls" in message:
        _check_tool_calls(message["tool_calls"], role, where)


def _check_tool_calls(calls: Any, role: str, where: str) -> None:
    if role != "assistant":
        raise RowError(f"{where}: tool_calls on a {role} turn; only the assistant calls tools")
    if not isinstance(calls, list):
        raise RowError(f"{where}: tool_calls is {json_type(calls)}, not a list: {shown(calls)}")
    for number, call in enumerate(calls, start=1):
        here = f"{where}: tool call {number}"
        function = _function_of(call, here)
        if not isinstance(function.get("arguments"), dict):
            raise RowError(
                f"{here} ({shown(function['name'])}): arguments is not an object: {shown(function.get('arguments'))}"
            )
        if "id" in call:
            check_text(call["id"], f"{here}: id")
        check_json(function["arguments"], f"{here}: arguments")


def _check_tool(tool: Any, where: str) -> None:
    function = _function_of(tool, where)
    if "description" in function:
        check_text(function["description"], f"{where}: description")
    if not isinstance(function.get("parameters", {}), Mapping):
        raise RowError(f"{where}: parameters is not an object: {shown(function['parameters'])}")
    check_json(function, where)


def _function_of(holder: Any, where: str) -> Mapping[str, Any]:
    """The function of a tool or a call: both are {"type": "function", "function": {"name", ...}}."""
    function = holder.get("function") if isinstance(holder, Mapping) else None
    if not isinstance(function, Mapping) or holder.get("type") != "function":
        raise RowError(f'{where} is not {{"type": "function", "function": {{"name", ...}}}}: {shown(holder)}')
    if not check_text(function.get("name"), f"{where}: name").strip():
        raise RowError(f"{where}: name is empty")
    return function


def check_json(value: Any, where: str) -> None:
    """Check every text and key inside a JSON value, and that it is not nested too deeply to be written out again.

    Raises:
        RowError: a lone surrogate, a key that is not text, or more than `MAX_DEPTH` levels.
    """
    waiting = [(value, 1)]
    while waiting:
        inner, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise RowError(f"{where}: nested more than {MAX_DEPTH} levels deep")
        if isinstance(inner, str):
            check_text(inner, where)
        elif isinstance(inner, Mapping):
            for key, item in inner.items():
                check_text(key, f"{where}: a key")
                waiting.append((item, depth + 1))
        elif isinstance(inner, list):
            waiting += [(item, depth + 1) for item in inner]
