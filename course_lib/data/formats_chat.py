"""Formats that are conversations already: `messages` (OpenAI, Hugging Face) and ShareGPT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from course_lib.data.conversation import ROLES, Conversation, Message, RowError, conversation, json_type, shown
from course_lib.data.formats_fields import (
    Row,
    list_field,
    note_left_out,
    optional_text_field,
    system_message,
    text_field,
)
from course_lib.data.formats_tools import read_tool_calls, tools_of_row
from course_lib.data.readers_json import read_json_text
from course_lib.errors import did_you_mean

_KEPT = ("role", "content", "tool_calls", "name", "tool_call_id", "reasoning_content", "train")
_OTHER_ROLES = {"function": "tool", "developer": "system"}  # OpenAI's old name of `tool`, and new name of `system`


def from_messages(row: Row, notes: list[str]) -> Conversation:
    """`messages`: the form of OpenAI's chat and fine-tuning API and of Hugging Face datasets and templates.

    Read as well: OpenAI's old `functions`, `function_call` and role `function`; role `developer`; content in parts of
    text, which are joined; arguments as JSON text; OpenAI's `weight: 0`, which is `train: False`.
    Source: https://platform.openai.com/docs/api-reference/chat and https://huggingface.co/docs/transformers/chat_extras
    """
    return conversation(read_messages(list_field(row, "messages", "messages"), notes), tools=tools_of_row(row, notes))


def read_messages(turns: list[Any], notes: list[str], *, first: int = 1) -> list[Message]:
    """Bring messages into the kept form; `conversation()` then checks them. `first` is the number of the first one.

    Raises:
        RowError: a content part that is not text, a broken tool call, a weight other than 0 and 1.
    """
    return [_read_message(turn, number, notes) for number, turn in enumerate(turns, start=first)]


def _read_message(turn: Any, number: int, notes: list[str]) -> Any:
    if not isinstance(turn, Mapping):
        return turn  # conversation() names it
    message = {key: turn[key] for key in _KEPT if turn.get(key) is not None}
    role = message.get("role")
    where = f"message {number} ({role if role in (*ROLES, *_OTHER_ROLES) else shown(role)})"
    if isinstance(role, str):
        message["role"] = _OTHER_ROLES.get(role, role)
    if isinstance(message.get("content"), list):
        message["content"] = _join_parts(message["content"], where)
    calls = _calls_of(turn, where, notes)
    message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = calls
        message.setdefault("content", "")
    if turn.get("weight") is not None and "train" not in message:
        if turn["weight"] not in (0, 1):
            raise RowError(f"{where}: weight is {shown(turn['weight'])}, not 0 or 1")
        message["train"] = bool(turn["weight"])
    note_left_out(turn, (*_KEPT, "function_call", "weight"), notes)
    return message


def _calls_of(turn: Row, where: str, notes: list[str]) -> list[Any]:
    calls, old_call = turn.get("tool_calls"), turn.get("function_call")
    if calls and old_call:
        raise RowError(f"{where}: both 'tool_calls' and 'function_call' are filled; keep one")
    if old_call:
        return read_tool_calls(old_call, f"{where}: function_call", notes)
    return read_tool_calls(calls, f"{where}: tool_calls", notes) if calls else []


def _join_parts(parts: list[Any], where: str) -> str:
    texts = []
    for number, part in enumerate(parts, start=1):
        if not isinstance(part, Mapping):
            raise RowError(f"{where}: content is an array, and its part {number} is no object: {shown(part)}")
        if part.get("type") != "text":
            raise RowError(f"{where}: content part {number} is {shown(part.get('type'))}: only text can be trained on")
        texts.append(text_field(part, "text", f"{where}: content part {number}"))
    return "".join(texts)


_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def from_sharegpt(row: Row, notes: list[str]) -> Conversation:
    """ShareGPT: `conversations` of {"from", "value"}, with `system` and `tools` beside it as LLaMA-Factory has them.

    A `function_call` turn holds JSON, {"name", "arguments"} or a list of them; an `observation` is what the tool said.
    Turns with role and content in place of from and value are read too.
    Source: https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md
    """
    messages = [
        _read_turn(turn, number, notes)
        for number, turn in enumerate(list_field(row, "conversations", "turns"), start=1)
    ]
    opening = system_message(optional_text_field(row, "system", "row"))
    if opening and messages and messages[0]["role"] == "system":
        if messages[0]["content"].strip() != opening[0]["content"].strip():
            raise RowError(
                f"two system texts: {shown(opening[0]['content'])} and, in turn 1, {shown(messages[0]['content'])}"
            )
        opening = []
    return conversation(opening + messages, tools=tools_of_row(row, notes))


def _read_turn(turn: Any, number: int, notes: list[str]) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"turn {number} is {json_type(turn)}, not an object with from and value: {shown(turn)}")
    who, what = ("from", "value") if "from" in turn or "role" not in turn else ("role", "content")
    speaker = turn.get(who)
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        hint = did_you_mean(speaker, _SPEAKERS) if isinstance(speaker, str) else ""
        raise RowError(f"turn {number}: unknown speaker {shown(speaker)} (known: {', '.join(_SPEAKERS)}){hint}")
    note_left_out(turn, (who, what), notes)
    where = f"turn {number} ({speaker})"
    if speaker == "function_call":
        value = turn.get(what)
        calls = read_json_text(value, where, notes) if isinstance(value, str) else value
        return {"role": "assistant", "content": "", "tool_calls": read_tool_calls(calls, where, notes)}
    return {"role": _SPEAKERS[speaker], "content": text_field(turn, what, where)}
