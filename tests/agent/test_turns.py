"""Calls against their schemas: what is wrong is said to the model in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
from agent_traces import TOOLS

from course_lib.agent.turns import Turn, call, what_is_wrong


def tool(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("search", {"query": "a"}, ""),
        ("search", {"query": "a", "limit": 3}, ""),
        ("serch", {"query": "a"}, "there is no tool 'serch'; the tools are: search, calculator; did you mean search?"),
        ("search", {}, '\'query\' is a required property; expected {"query": "string", "limit": "integer"}'),
        ("search", {"query": 5}, "query: 5 is not of type 'string'"),
        ("search", {"query": "a", "limit": 2.5}, "limit: 2.5 is not of type 'integer'"),
        ("search", {"query": "a", "limt": 2}, "unknown argument 'limt'; did you mean limit?"),
        ("search", {"query": ["x" * 10_000]}, "is not of type 'string'"),
    ],
)
def test_a_call_is_checked_against_its_schema(name: str, arguments: dict[str, Any], says: str) -> None:
    wrong = what_is_wrong(call(name, arguments), TOOLS)
    assert says in wrong
    assert bool(wrong) == bool(says)
    assert len(wrong) < 500


def test_a_path_to_the_fault_is_given() -> None:
    inner = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}}
    assert "a[1]: 'x' is not of type 'integer'" in what_is_wrong(call("f", {"a": [1, "x"]}), tool(inner))


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "strange"},
        {"type": "object", "properties": {"a": {"$ref": "http://localhost:9/schema.json"}}},
        {"$ref": "#/$defs/none"},
    ],
)
def test_a_schema_that_is_wrong_or_elsewhere_is_told_and_nothing_is_fetched(parameters: dict[str, Any]) -> None:
    assert "the schema of f is itself wrong" in what_is_wrong(call("f", {"a": 1}), tool(parameters))


def test_tools_without_a_schema_take_anything() -> None:
    assert what_is_wrong(call("f", {"a": 1}), [{"type": "function", "function": {"name": "f"}}]) == ""
    assert (
        what_is_wrong(call("f", {"a": 1}), tool({"type": "object", "properties": {}, "additionalProperties": True}))
        == ""
    )


def test_an_error_has_no_message() -> None:
    with pytest.raises(ValueError, match="could not be read has no message: broken"):
        Turn(error="broken").message()
