"""Tools: schemas from signatures, and outcomes that are plain, short, in time and without keys, whatever a tool does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import pytest

from course_lib.agent import tools as tools_module
from course_lib.agent.tools import TOOL_NAMES, plain, run_tool, shipped_tools, tool_from
from course_lib.agent.turns import call, what_is_wrong
from course_lib.data.conversation import conversation
from course_lib.errors import InputError


def weather(city: str, days: int = 1, unit: Literal["C", "F"] = "C", places: list[str] | None = None) -> str:
    """The weather
    of a city.

    It is made up.

    Args:
        city: name of the city,
            in English
        days (int): how many days

    Returns:
        unit: not an argument
    """
    return f"{city} {days} {unit} {places}"


def test_the_schema_comes_from_signature_and_docstring() -> None:
    tool = tool_from(weather)
    assert tool.schema == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "name of the city, in English"},
                    "days": {"type": "integer", "description": "how many days"},
                    "unit": {"enum": ["C", "F"], "type": "string"},
                    "places": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
                },
                "required": ["city"],
            },
        },
    }
    assert run_tool(tool, {"city": "Oslo", "days": 2}).text == "Oslo 2 C None"
    assert "'K' is not one of" in what_is_wrong(call("weather", {"city": "Oslo", "unit": "K"}), [tool.schema])


def no_type(city) -> str:  # type: ignore[no-untyped-def]
    """About."""
    return ""


def no_docstring(city: str) -> str:
    return ""


def any_number(*cities: str) -> str:
    """About."""
    return ""


def a_function_of_functions(city: Callable[[], str]) -> str:
    """About."""
    return ""


def a_type_from_nowhere(city: Nowhere) -> str:  # type: ignore[name-defined]  # noqa: F821
    """About."""
    return ""


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (a_type_from_nowhere, "'Nowhere' is not defined"),
        (no_type, "parameter city has no type"),
        (no_docstring, "has no docstring"),
        (any_number, "cannot be given by name"),
        (a_function_of_functions, "without a JSON schema"),
    ],
)
def test_functions_that_cannot_be_tools_are_refused(function: Callable[..., Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        tool_from(function)


@pytest.mark.parametrize("name", ["a b", "a\nAction: b", "1a", "x" * 65, "<|im_end|>", "名"])
def test_names_that_a_protocol_could_not_write_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="tool name"):
        tool_from(weather, name=name)


def test_shipped_tools_have_schemas_and_python_is_off_unless_asked_for() -> None:
    tools = shipped_tools()
    assert [tool.name for tool in tools] == ["search", "calculator", "solve", "clock", "convert_units"]
    assert (*(tool.name for tool in tools), "python") == TOOL_NAMES
    conversation([{"role": "assistant", "content": "a"}], tools=[tool.schema for tool in tools])
    for tool in tools:
        assert "stopped" not in tool.parameters["properties"]
    with pytest.raises(InputError, match="'calculater' is unknown.*did you mean calculator"):
        shipped_tools(["calculater"])


def test_python_is_refused_where_nothing_would_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools_module, "isolation_in_force", lambda: ("Python's audit hook",))
    with pytest.raises(InputError, match="held by Python's audit hook alone"):
        shipped_tools(["python"])


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("calculator", {"expression": "931 + 26"}, "957"),
        (
            "calculator",
            {"expression": "__import__('os').system('touch hacked')"},
            "error: '_' is no part of arithmetic",
        ),
        ("calculator", {"expression": "9**9**9"}, "error: the power is too large"),
        ("solve", {"equations": "x + 2 = 5"}, "x = 3"),
        ("clock", {}, "20"),
        ("clock", {"timezone": "Asia/Shanghai"}, "CST"),
        (
            "clock",
            {"timezone": "Asia/Shanghia"},
            "error: the time zone 'Asia/Shanghia' is unknown; did you mean Asia/Shanghai",
        ),
        ("clock", {"timezone": "../../../../etc/passwd"}, "error: the time zone"),
        ("clock", {"timezone": "/etc/passwd"}, "error: the time zone"),
        ("clock", {"timezone": "\x00"}, "error: the time zone"),
        ("convert_units", {"value": 5, "from_unit": "km", "to_unit": "mi"}, "5 km = 3.106855961 mi"),
        ("convert_units", {"value": 5, "from_unit": "km", "to_unit": "kg"}, "error: km is a unit of length"),
        ("python", {"code": "print(6 * 7)"}, "42"),
        ("python", {"code": "import os\nos.fork()"}, "not allowed here: os.fork"),
        ("python", {"code": "import os\nos._exit(7)"}, "[ended with status 7]"),
        ("python", {"code": "x = 1"}, "(it printed nothing)"),
    ],
)
def test_shipped_tools_answer(
    name: str, arguments: dict[str, Any], says: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in run_tool(shipped_tools([name])[0], arguments).text
    assert list(tmp_path.iterdir()) == []


def test_a_fork_bomb_is_contained(monkeypatch: pytest.MonkeyPatch) -> None:
    python = shipped_tools(["python"])[0]
    attempt = "    try:\n        if os.fork() == 0: os._exit(0)\n        forked += 1\n    except OSError:\n        pass"
    counted = f"import os\nforked = 0\nfor _ in range(1000):\n{attempt}\nprint('forked', forked)"
    assert run_tool(python, {"code": counted}).text == "forked 0"
    monkeypatch.setattr(tools_module, "PYTHON_SECONDS", 1.0)
    outcome = run_tool(python, {"code": f"import os\nforked = 0\nwhile True:\n{attempt}"})
    assert outcome.text.endswith("[killed: it hit the time limit of 1 seconds]")
    assert outcome.seconds < 4


def _tool(function: Callable[[], Any], **limits: Any) -> Any:
    def run() -> Any:
        """Run."""
        return function()

    return tool_from(run, **limits)


def test_a_result_of_10_mb_is_cut() -> None:
    outcome = run_tool(_tool(lambda: "x" * 10_000_000), {})
    assert outcome.text == "x" * 2000 + " … [10000000 characters, the first 2000 shown]"
    assert outcome.seconds < 2


def test_escape_sequences_surrogates_and_odd_values_become_plain_text() -> None:
    assert run_tool(_tool(lambda: "\x1b[2J\x1b]0;title\x07red\x1b[0m\x00 \ud83d"), {}).text == "]0;titlered ?"
    assert run_tool(_tool(lambda: {"a": [1, {2}]}), {}).text == '{"a": [1, "{2}"]}'
    assert run_tool(_tool(lambda: " \n"), {}).text == "(nothing)"
    assert run_tool(_tool(lambda: None), {}).text == "null"


def test_what_a_tool_raises_becomes_an_error_for_the_model() -> None:
    def fail(error: BaseException) -> Callable[[], Any]:
        def run() -> Any:
            raise error

        return run

    for error, says in [
        (ValueError("no"), "error: no"),
        (KeyboardInterrupt(), "error: KeyboardInterrupt"),
        (SystemExit(3), "error: 3"),
    ]:
        outcome = run_tool(_tool(fail(error)), {})
        assert (outcome.text, outcome.failed) == (says, True)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert run_tool(_tool(lambda: deep), {}).failed


def test_a_tool_that_takes_too_long_is_left_and_a_stop_ends_the_wait() -> None:
    outcome = run_tool(_tool(lambda: time.sleep(5), seconds=0.1), {})
    assert (outcome.text, outcome.failed) == ("error: run took longer than 0.1 seconds", True)
    outcome = run_tool(_tool(lambda: time.sleep(5)), {}, stopped=lambda: True)
    assert outcome.text == "error: stopped by the user"
    assert outcome.seconds < 1


def test_keys_of_the_environment_are_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERPER_API_KEY", "sk-0123456789")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("SHORT_KEY", "abc")
    assert plain("a sk-0123456789 b hf_abcdefgh abc") == "a [SERPER_API_KEY] b [HF_TOKEN] abc"
