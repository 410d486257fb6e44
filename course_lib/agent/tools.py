"""Tools: typed Python functions that a model may call, with limits on their time and on what they say.

A tool's schema comes from its signature and docstring:

    def weather(city: str, days: int = 1) -> str:
        \"\"\"The weather of a city.

        Args:
            city: name of the city
        \"\"\"

    runner = AgentRunner(session, tools=[tool_from(weather)])
"""

from __future__ import annotations

import datetime
import inspect
import json
import os
import re
import threading
import time
import typing
import zoneinfo
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from course_lib.agent import calculator as arithmetic
from course_lib.agent import equations, units
from course_lib.agent import search as searching
from course_lib.agent.isolation import isolation_in_force, run_child
from course_lib.agent.lock_down import SYSTEM_CALLS
from course_lib.chat.terminal import printable
from course_lib.data.conversation import Tool, shown
from course_lib.errors import InputError, did_you_mean

LONGEST_RESULT = 2_000  # characters the model sees of a result
_LOOKED_AT = 200_000  # characters of a result that are looked at, whatever it is
_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
Stopped = Callable[[], bool]


@dataclass(frozen=True)
class AgentTool:
    """A tool: what the model is told of it, and the function. `parameters` is a JSON schema.

    `run` gets the arguments by keyword, already checked against the schema; what it returns becomes text, what it raises an
    error for the model. With `stoppable` it also gets `stopped`, a function that says whether to give up. After `seconds` the
    model is told so, and what runs on is left to itself on its thread.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    run: Callable[..., Any]
    seconds: float = 15.0
    longest: int = LONGEST_RESULT
    stoppable: bool = False

    @property
    def schema(self) -> Tool:
        """OpenAI's form."""
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": self.parameters},
        }


@dataclass(frozen=True)
class Outcome:
    """What a tool said, as the model sees it: plain, cut and without keys."""

    text: str
    failed: bool
    seconds: float


def tool_from(
    function: Callable[..., Any], *, name: str = "", seconds: float = 15.0, longest: int = LONGEST_RESULT
) -> AgentTool:
    """Make a function a tool. A keyword-only parameter `stopped` is the runner's, not the model's.

    Raises:
        InputError: a parameter has no type, or one without a JSON schema; no docstring; a name that is no identifier.
    """
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

    name = name or function.__name__
    if not _NAME.fullmatch(name):
        raise InputError(
            f"tool name {shown(name)}: use letters, digits, _ . and -, 64 at most, and begin with a letter"
        )
    about, described = _docstring(function)
    if not about:
        raise InputError(f"tool {name}: has no docstring; its first paragraph tells the model what it does")
    try:
        hints = typing.get_type_hints(function)
    except NameError as error:
        raise InputError(f"tool {name}: one of its types is not there where it is defined: {error}") from None
    properties, required, stoppable = {}, [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "stopped" and parameter.kind is parameter.KEYWORD_ONLY:
            stoppable = True
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise InputError(f"tool {name}: {parameter} cannot be given by name; write its parameters out")
        if parameter.name not in hints:
            raise InputError(f"tool {name}: parameter {parameter.name} has no type")
        try:
            schema = TypeAdapter(hints[parameter.name]).json_schema()
        except (PydanticSchemaGenerationError, PydanticUserError):
            raise InputError(
                f"tool {name}: parameter {parameter.name} has a type without a JSON schema: {hints[parameter.name]}"
            ) from None
        if parameter.name in described:
            schema["description"] = described[parameter.name]
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        properties[parameter.name] = schema
    parameters = {"type": "object", "properties": properties, "required": required}
    return AgentTool(name, about, parameters, function, seconds=seconds, longest=longest, stoppable=stoppable)


def run_tool(tool: AgentTool, arguments: Mapping[str, Any], *, stopped: Stopped = lambda: False) -> Outcome:
    """Run a tool and wait for it, at most its `seconds`; never raises for what the tool does."""
    started = time.perf_counter()
    said: list[Any] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            value = tool.run(**arguments, stopped=stopped) if tool.stoppable else tool.run(**arguments)
            said.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
        except BaseException as error:
            failed.append(error)

    worker = threading.Thread(target=work, name=f"tool {tool.name}", daemon=True)
    worker.start()
    while worker.is_alive() and time.perf_counter() - started < tool.seconds and not stopped():
        worker.join(timeout=0.02)
    if said:
        text = said[0]
    elif failed:
        text = f"error: {str(failed[0]) or type(failed[0]).__name__}"
    else:
        text = (
            "error: stopped by the user"
            if stopped()
            else f"error: {tool.name} took longer than {tool.seconds:g} seconds"
        )
    return Outcome(plain(text, tool.longest), failed=not said, seconds=time.perf_counter() - started)


def plain(text: str, longest: int = LONGEST_RESULT) -> str:
    """Text as the model and the terminal may have it: valid Unicode, no escape sequences, no keys, at most so many characters."""
    whole = len(text)
    text = printable(redacted(text[:_LOOKED_AT].encode("utf-8", "replace").decode()))
    if whole > longest and len(text) > longest:
        return f"{text[:longest]} … [{whole} characters, the first {longest} shown]"
    return text.strip() or "(nothing)"


def redacted(text: str) -> str:
    """Text with the values of environment variables such as SERPER_API_KEY and HF_TOKEN replaced by their names."""
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_NAME.search(name):
            text = text.replace(value, f"[{name}]")
    return text


def search(query: str) -> str:
    """Search for facts; returns short texts.

    Args:
        query: what to search for
    """
    return "\n".join(searching.search(query)) or "nothing was found; try other words"


def calculator(expression: str) -> str:
    """Work out an arithmetic expression.

    Args:
        expression: such as (3 + 4) * 2^5, sqrt(2) or 15% * 80
    """
    return arithmetic.calculate(expression)


def solve(equations: str, *, stopped: Stopped) -> str:
    """Solve an equation or a system of equations.

    Args:
        equations: such as x^2 = 4, or 2x + y = 5; x - y = 1
    """
    return _solve(equations, stopped=stopped)


_solve = equations.solve


def clock(timezone: str = "") -> str:
    """The current date and time.

    Args:
        timezone: such as Asia/Shanghai; by default the time of this machine
    """
    try:
        zone = zoneinfo.ZoneInfo(timezone) if timezone else None
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):  # a path that leads elsewhere is a ValueError
        near = did_you_mean(timezone[:60], zoneinfo.available_timezones())
        raise ValueError(f"the time zone {timezone[:60]!r} is unknown{near}") from None
    return datetime.datetime.now(zone).astimezone(zone).strftime("%A, %Y-%m-%d %H:%M:%S %Z")


def convert_units(value: float, from_unit: str, to_unit: str) -> str:
    """Convert a quantity to another unit.

    Args:
        from_unit: such as km, lb or celsius
        to_unit: a unit of the same quantity
    """
    return units.convert(value, from_unit, to_unit)


def python(code: str, *, stopped: Stopped) -> str:
    """Run Python code, without network and files of its own, and return what it prints.

    Args:
        code: the program; the value of its last line is printed too
    """
    ended = run_child("python_child.py", {"code": code}, seconds=PYTHON_SECONDS, stopped=stopped)
    note = f"\n[killed: it hit {ended.limit}]" if ended.limit else ""
    note = note or (f"\n[ended with status {ended.status}]" if ended.status not in (0, 1) else "")
    return (ended.output.rstrip() + note) or "(it printed nothing)"


PYTHON_SECONDS = 10.0
_DEFAULT = (search, calculator, solve, clock, convert_units)
TOOL_NAMES = (*(function.__name__ for function in _DEFAULT), "python")


def shipped_tools(names: Iterable[str] | None = None) -> list[AgentTool]:
    """The tools of the course by name; by default all but `python`, which runs only where it is asked for.

    Raises:
        InputError: an unknown name, or `python` where this machine cannot forbid it the network and other processes.
    """
    functions = {function.__name__: function for function in (*_DEFAULT, python)}
    chosen = [function.__name__ for function in _DEFAULT] if names is None else list(dict.fromkeys(names))
    for name in chosen:
        if name not in functions:
            raise InputError(
                f"tool {name!r} is unknown: choose {', '.join(TOOL_NAMES)}{did_you_mean(name, TOOL_NAMES)}"
            )
    if "python" in chosen and SYSTEM_CALLS not in isolation_in_force():
        held_by = ", ".join(isolation_in_force()) or "nothing"
        raise InputError(
            f"tool python needs Linux with {SYSTEM_CALLS}; here code would be held by {held_by} alone; leave it out"
        )
    return [tool_from(functions[name]) for name in chosen]


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The first paragraph on one line, and the descriptions under `Args:` (Google style)."""
    text = inspect.getdoc(function) or ""
    about = " ".join(text.split("\n\n")[0].split())
    _, _, arguments = text.partition("Args:\n")
    section = re.split(r"\n(?=\S)", arguments)[0]
    entries = re.findall(r"^ +(\w+)(?: \([^)]*\))?: (.+(?:\n {8,}.+)*)", section, re.MULTILINE)
    return about, {name: " ".join(said.split()) for name, said in entries}
