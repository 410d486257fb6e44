"""Tools and tool calls of every format, brought into OpenAI's form.

What is only written differently is rewritten here; whether the result is well formed is for `conversation()` to check.
OpenAI's form: https://platform.openai.com/docs/guides/function-calling
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from course_lib.data.conversation import RowError, Tool, ToolCall, json_type, shown
from course_lib.data.formats_fields import Row, note_left_out
from course_lib.data.readers_json import read_json_text


def tools_of_row(row: Row, notes: list[str]) -> list[Tool]:
    """The tools of a row: under `tools`, or under OpenAI's old name `functions`.

    Raises:
        RowError: both are filled, or as `read_tools`.
    """
    tools = read_tools(row.get("tools"), "tools", notes)
    functions = read_tools(row.get("functions"), "functions", notes)
    if tools and functions:
        raise RowError("both 'tools' and 'functions' are filled; keep one")
    return tools or functions


def read_tools(value: Any, where: str, notes: list[str]) -> list[Tool]:
    """Tools given as a list, one object, or either as JSON text; null, "" and "[]" are none.

    A bare schema {"name", "description"?, "parameters"?} (ShareGPT, OpenAI's old `functions`) is wrapped.

    Raises:
        RowError: broken JSON, or something else than a list of objects.
    """
    if isinstance(value, str):
        value = read_json_text(value, where, notes) if value.strip() else None
    if value is None:
        return []
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise RowError(f"{where} is {json_type(value)}, not a list of function schemas: {shown(value)}")
    return [_read_tool(tool) for tool in value]


def _read_tool(tool: Any) -> Any:
    if not isinstance(tool, Mapping):
        return tool  # conversation() names it
    function = tool if "function" not in tool and "name" in tool else tool.get("function")
    if isinstance(function, Mapping):
        empty = [key for key in ("description", "parameters") if key in function and function[key] is None]
        function = {key: value for key, value in function.items() if key not in empty}
    return {
        "type": "function" if function is tool or "function" not in tool else tool.get("type", "function"),
        "function": function,
    }


def read_tool_calls(value: Any, where: str, notes: list[str]) -> list[ToolCall]:
    """Calls given as a list or one object, each {"id"?, "type"?, "function": {"name", "arguments"}} or the bare function.

    `arguments` is an object or its JSON text; null and "" are an empty object.

    Raises:
        RowError: broken JSON, or something else than a list of objects.
    """
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise RowError(f"{where} is {json_type(value)}, not a list of calls: {shown(value)}")
    return [_read_tool_call(call, f"{where}, call {number}", notes) for number, call in enumerate(value, start=1)]


def _read_tool_call(call: Any, where: str, notes: list[str]) -> Any:
    if not isinstance(call, Mapping):
        raise RowError(f"{where} is {json_type(call)}, not an object: {shown(call)}")
    function = call.get("function", call)
    if not isinstance(function, Mapping):
        raise RowError(f"{where}: function is {json_type(function)}, not an object: {shown(function)}")
    note_left_out(function, ("id", "type", "name", "arguments"), notes)
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    elif isinstance(arguments, str):
        arguments = read_json_text(arguments, f"{where}: arguments", notes)
    identity = {"id": call["id"]} if call.get("id") is not None else {}
    return {
        **identity,
        "type": call.get("type") or "function",
        "function": {"name": function.get("name"), "arguments": arguments},
    }
