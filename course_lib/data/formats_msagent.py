"""MSAgent-Bench: conversations whose assistant turns hold calls and their results as marked text, all tools in the system turn.

    {"id": "MS_Agent_Bench_20", "conversations": [
        {"from": "system", "value": "… 1. {name, description, parameters: [{name, description, required}]} …"},
        {"from": "user", "value": "…"},
        {"from": "assistant", "value": "words <|startofthink|>```JSON {api_name, parameters: {…}} ```<|endofthink|>
            <|startofexec|>```JSON … ```<|endofexec|> answer"}]}

`conversations` comes as a list or as the text of one, in JSON or as Python writes it. One assistant turn of it becomes several:
each round of calls, its results as `tool` turns (nobody trains what a tool says), and the answer.
Source: https://github.com/modelscope/modelscope-agent (README, training) and Li et al. 2023, arXiv 2309.00986.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from course_lib.data.conversation import Conversation, Message, RowError, Tool, conversation, json_type, shown
from course_lib.data.formats_fields import Row, leave_off_unanswered, note_left_out, system_message, text_field
from course_lib.data.formats_tools import read_tool_calls, read_tools
from course_lib.data.readers_json import read_json_text

SPEAKERS = ("system", "user", "assistant")
# What a mark holds: a call, or what the tool said. Its fence (```JSON … ```) is no part of it.
_MARKED = re.compile(r"<\|startof(think|exec)\|>(.*?)<\|endof\1\|>", re.DOTALL)
_LONE_MARK = re.compile(r"<\|(?:start|end)of(?:think|exec)\|>")
_FENCE = re.compile(r"```\w*\s*(.*?)\s*```", re.DOTALL)
_TOOL = re.compile(r'\{\s*"(?:plugin_)?name"\s*:')
_TURN_IN_SYSTEM = re.compile(r"<\|(?:user|assistant)\|>:")
_JSON_PIECE = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]|[^"{}\[\]]+|"', re.DOTALL)
_JSON_TYPES = ("string", "number", "integer", "boolean", "array", "object")

RULES_LEFT_OFF = "the system turn's own rules of calling left off: a protocol has its own"
UNLISTED = "a call of a tool that the system turn does not list"
BRACKETS_LEFT_OUT = "closing brackets too many in a tool of the system turn, left out"
ADDRESS_LEFT_OUT = "the url of a call left out: the tool's name says which it is"


def is_msagent(row: Row) -> bool:
    """Whether the `conversations` of a row are MSAgent's, and not ShareGPT's, which has the same key and the same from and value.

    As text they are always MSAgent's. As a list they are where all speakers are system, user and assistant, no column `tools`
    or `functions` stands beside them, and a system or assistant turn has MSAgent's marks.
    """
    turns = row.get("conversations")
    if not isinstance(turns, list):
        return isinstance(turns, str)
    said = [(turn.get("from"), turn.get("value")) for turn in turns if isinstance(turn, Mapping)]
    return (
        not (row.get("tools") or row.get("functions"))
        and len(said) == len(turns)
        and all(isinstance(who, str) and who in SPEAKERS for who, _ in said)
        and any(who != "user" and isinstance(text, str) and "<|startofthink|>" in text for who, text in said)
    )


def from_msagent(row: Row, notes: list[str]) -> Conversation:
    """MSAgent-Bench: think marks become tool calls, exec marks tool turns, the tools of the system turn `tools`.

    Where the system turn lists tools, nothing else of it is kept: it says how to write calls, which is for the protocol to say.
    """
    turns = row["conversations"]
    if isinstance(turns, str):
        turns = _value_of(turns, "conversations", notes)
    if not isinstance(turns, list):
        raise RowError(f"conversations is {json_type(turns)}, not a list of turns: {shown(turns)}")
    messages: list[Message] = []
    tools: list[Tool] = []
    for number, turn in enumerate(turns, start=1):
        speaker, text = _read_turn(turn, number, notes)
        where = f"turn {number} ({speaker})"
        if speaker == "system":
            listed = _tools_in(text, where, notes)
            messages += [] if listed else system_message(text)
            tools += listed
        elif speaker == "user":
            messages.append({"role": "user", "content": text.strip()})
        else:
            messages += _assistant_turns(text, where, notes)
    if tools:
        _note(RULES_LEFT_OFF, notes)
    _check_results(messages)
    row_out = conversation(leave_off_unanswered(messages, notes), tools=tools)
    names = {tool["function"]["name"] for tool in tools}
    if any(call["function"]["name"] not in names for message in messages for call in message.get("tool_calls", [])):
        _note(UNLISTED, notes)
    return row_out


def _note(text: str, notes: list[str]) -> None:
    """Once a row, so that a report counts rows."""
    if text not in notes:
        notes.append(text)


def _read_turn(turn: Any, number: int, notes: list[str]) -> tuple[str, str]:
    if not isinstance(turn, Mapping):
        raise RowError(f"turn {number} is {json_type(turn)}, not an object with from and value: {shown(turn)}")
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise RowError(f"turn {number}: unknown speaker {shown(speaker)} (known: {', '.join(SPEAKERS)})")
    note_left_out(turn, ("from", "value"), notes)
    return speaker, text_field(turn, "value", f"turn {number} ({speaker})")


def _assistant_turns(text: str, where: str, notes: list[str]) -> Iterator[Message]:
    """The messages of one turn. Calls with only white space between them are one round; then come their results."""
    words, calls, names, position = "", [], [], 0
    for mark in _MARKED.finditer(text):
        between, content = _words(text[position : mark.start()], where), _FENCE.sub(r"\1", mark[2]).strip()
        position = mark.end()
        if calls and (between or mark[1] == "exec"):
            yield {"role": "assistant", "content": words, "tool_calls": calls}
            calls = []
        if mark[1] == "think":
            words = words if calls else between
            calls = [*calls, _read_call(content, where, notes)]
            names.append(calls[-1]["function"]["name"])
        elif not names:
            raise RowError(f"{where}: a result without a call: {shown(content)}")
        elif between:
            raise RowError(f"{where}: words between a call and its result: {shown(between)}")
        else:
            yield {"role": "tool", "name": names.pop(0), "content": content}
    if calls:
        yield {"role": "assistant", "content": words, "tool_calls": calls}
    rest = _words(text[position:], where)
    if rest or not position:
        yield {"role": "assistant", "content": rest}


def _words(text: str, where: str) -> str:
    if mark := _LONE_MARK.search(text):
        raise RowError(f"{where}: {mark[0]} without its other half")
    return text.strip()


def _read_call(text: str, where: str, notes: list[str]) -> Any:
    call = _value_of(text, f"{where}: call", notes)
    if not isinstance(call, Mapping) or "api_name" not in call:
        raise RowError(f"{where}: the call is not an object with api_name and parameters: {shown(text)}")
    if call.get("url"):
        _note(ADDRESS_LEFT_OUT, notes)
    note_left_out(call, ("api_name", "parameters", "url"), notes)
    return read_tool_calls({"name": call["api_name"], "arguments": call.get("parameters")}, where, notes)[0]


def _check_results(messages: list[Message]) -> None:
    """Every call has a result before the next turn of another role; the last one of a row may have none.

    Raises:
        RowError: a call has none.
    """
    missing = 0
    for number, message in enumerate(messages, start=1):
        if message["role"] == "tool":
            missing -= 1
        elif missing:
            raise RowError(f"message {number} ({message['role']}): a call before it has no result")
        else:
            missing = len(message.get("tool_calls", []))


def _tools_in(text: str, where: str, notes: list[str]) -> list[Tool]:
    """The tools a system text lists; none where it lists none. Numbers before them and all other text are passed over."""
    if found := _TURN_IN_SYSTEM.search(text):
        raise RowError(f"{where}: holds turns of its own, {shown(found[0])}")
    tools: list[Any] = []
    position = 0
    while found := _TOOL.search(text, position):
        here = f"{where}: tool {len(tools) + 1}"
        balanced, position = _balanced(text, found.start())
        rest = text[position:].lstrip()
        if len(balanced) != position - found.start() or rest.startswith(("]", "}")):
            _note(BRACKETS_LEFT_OUT, notes)
        tools.append(_function_of(read_json_text(balanced, here, notes), here))
    return read_tools(tools, where, notes)


def _balanced(text: str, start: int) -> tuple[str, int]:
    """The JSON object that starts at `start`, and where it ends, without closing brackets that close nothing.

    The files have them: `"parameters": [{…}]}]}` where `"parameters": [{…}]}` is meant.
    """
    kept: list[str] = []
    closing: list[str] = []
    position = start
    for found in _JSON_PIECE.finditer(text, start):
        piece, position = found[0], found.end()
        if piece in ("{", "["):
            closing.append("}" if piece == "{" else "]")
        elif piece in ("}", "]"):
            if piece != closing[-1]:
                continue
            closing.pop()
        kept.append(piece)
        if not closing:
            break
    return "".join(kept), position


def _function_of(tool: Any, where: str) -> dict[str, Any]:
    """A tool of the system text as OpenAI's function: bare, or `plugin_name` with the same under `plugin_schema_for_model`.

    Parameters are a list of {"name", "description", "required"?, "type"?}, where `required` may be the text "True"; they stand
    in the tool, or in the one entry of its `paths`. A JSON schema is taken as it is.
    """
    schema = tool.get("plugin_schema_for_model", tool)
    if not isinstance(schema, Mapping):
        raise RowError(f"{where}: plugin_schema_for_model is {json_type(schema)}, not an object: {shown(schema)}")
    paths = schema.get("paths")
    if paths and not (isinstance(paths, list) and len(paths) == 1 and isinstance(paths[0], Mapping)):
        raise RowError(f"{where}: paths is not a list of one object: {shown(paths)}")
    parameters = (paths[0] if paths else schema).get("parameters", [])
    if isinstance(parameters, list):
        if not all(isinstance(one, Mapping) and isinstance(one.get("name"), str) for one in parameters):
            raise RowError(f"{where}: a parameter is not an object with a name: {shown(parameters)}")
        parameters = {
            "type": "object",
            "properties": {one["name"]: _schema_of(one) for one in parameters},
            "required": [one["name"] for one in parameters if str(one.get("required")).lower() == "true"],
        }
    function = {"name": schema.get("name", tool.get("plugin_name")), "parameters": parameters}
    return function | ({"description": schema["description"]} if schema.get("description") else {})


def _schema_of(parameter: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's JSON schema. Most have no type: none is made up, for values of all types stand in the calls."""
    known = {key: parameter[key] for key in ("type", "description", "enum") if parameter.get(key)}
    if known.get("type") not in _JSON_TYPES:
        known.pop("type", None)
    return known


def _value_of(text: str, where: str, notes: list[str]) -> Any:
    """The value of JSON, or of a literal as Python writes it (single quotes, True, None); nothing is run.

    Raises:
        RowError: it is neither; the message is that of the form it looks like.
    """
    try:
        return read_json_text(text, where, notes)
    except RowError as error:
        broken_json = error
    try:
        with warnings.catch_warnings(action="ignore"):  # of "\d" and such, where the text was no Python
            value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise broken_json from None
    return _as_json(value, where)


def _as_json(value: Any, where: str) -> Any:
    """Python's literals as JSON's: tuples are lists; bytes, sets and complex numbers have no form there."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _as_json(inner, where) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(inner, where) for inner in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise RowError(f"{where}: Python's {type(value).__name__} has no form in JSON: {shown(value)}")
