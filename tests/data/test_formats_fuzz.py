"""Random and hostile rows and files: a conversation or a reason, never another error."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from course_lib.data.conversation import ROLES, RowError
from course_lib.data.formats import FORMATS, assemble_rows, read_rows, to_conversation
from course_lib.errors import InputError


def nested(depth: int, wrap: Callable[[Any], Any]) -> Any:
    value: Any = "bottom"
    for _ in range(depth):
        value = wrap(value)
    return value


HOSTILE = [
    "",
    "\x00",
    "\ud800",
    "a\udfffb",
    "x" * 5_000,
    "\n\r\u2028",
    "### Human:### Assistant:",
    "### Human: q### Assistant: a",
    "<nooutput>",
    "[]",
    "[" * 5000,
    '{"name": "f", "arguments": {}}',
    '{"name": "f", "arguments": "{}", "name": "\\ud800"}',
    "9" * 5000,
    1e400,
    float("nan"),
    -1,
    0,
    True,
    None,
    [],
    {},
    nested(110, lambda inner: [inner]),
    nested(110, lambda inner: {"x": inner}),
]
MONSTERS = [  # Hypothesis cannot print these
    10**5000,
    nested(5_000, lambda inner: [inner]),
    nested(5_000, lambda inner: {"function": inner}),
    nested(5_000, lambda inner: {"text": "t", "role": "assistant", "replies": [inner] if inner != "bottom" else []}),
]
KEYS = [
    *(
        "role",
        "content",
        "train",
        "weight",
        "tool_calls",
        "name",
        "tool_call_id",
        "function_call",
        "function",
        "id",
        "type",
    ),
    *(
        "arguments",
        "parameters",
        "description",
        "tools",
        "functions",
        "from",
        "value",
        "system",
        "input",
        "output",
        "history",
    ),
    *("output_with_loss", "text", "replies", "rank", "deleted", "review_result", "parent_id", "message_id"),
]
ROW_KEYS = sorted({key for row_format in FORMATS.values() for keys in row_format.keys for key in keys})
NAMES = [*ROLES, "human", "gpt", "observation", "prompter", "function", "text", "image_url"]

leaves = st.sampled_from(HOSTILE) | st.sampled_from(NAMES) | st.integers() | st.floats() | st.text(max_size=8)
# surrogates are left out of st.text() by default; HOSTILE has them
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner, max_size=5)
    ),
    max_leaves=12,
)
turns = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(NAMES) | values,
            "from": st.sampled_from(NAMES) | values,
            "content": leaves,
            "value": leaves,
            "input": leaves,
            "output": leaves,
            "tool_calls": values,
            "function_call": values,
            "text": leaves,
            "replies": values,
        },
    )
    | values,
    max_size=4,
)
rows = st.dictionaries(st.sampled_from(ROW_KEYS + KEYS) | st.text(max_size=3), turns | values, max_size=6)
fuzz = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def check(row: Any, row_format: str = "auto") -> None:
    """Convert a row: a valid conversation, or a reason that fits a line."""
    notes: list[str] = []
    try:
        conversation = to_conversation(row, row_format=row_format, notes=notes)
    except RowError as reason:
        assert 0 < len(str(reason)) < 900
        assert str(reason).isprintable()
    else:
        check_valid(conversation)
    assert all(isinstance(note, str) and note.isprintable() for note in notes)


def check_valid(conversation: Any) -> None:
    json.dumps(conversation, ensure_ascii=False).encode()
    if "text" in conversation:
        assert list(conversation) == ["text"]
        assert conversation["text"].strip()
        return
    assert set(conversation) <= {"messages", "tools"}
    messages = conversation["messages"]
    for number, message in enumerate(messages):
        assert set(message) <= {"role", "content", "tool_calls", "name", "tool_call_id", "train"}
        assert message["role"] in ROLES
        assert message["role"] != "system" or number == 0
        assert all(isinstance(message.get(key, ""), str) for key in ("content", "name", "tool_call_id"))
        assert isinstance(message.get("train", True), bool)
        for call in message.get("tool_calls", []):
            assert message["role"] == "assistant"
            assert call["type"] == "function"
            assert call["function"]["name"].strip()
            assert isinstance(call["function"]["arguments"], dict)
            assert set(call["function"]) == {"name", "arguments"}
    assert any(
        message["role"] == "assistant" and (message["content"].strip() or message.get("tool_calls"))
        for message in messages
    )
    for tool in conversation.get("tools", []):
        assert set(tool) == {"type", "function"}
        assert tool["function"]["name"].strip()


@fuzz
@given(rows)
def test_any_row_of_any_keys(row: dict) -> None:
    check(row)


@pytest.mark.parametrize("name", FORMATS)
@fuzz
@given(data=st.data())
def test_every_converter_with_its_own_keys(name: str, data: st.DataObject) -> None:
    keys = data.draw(st.sampled_from(FORMATS[name].keys))
    row = {key: data.draw(turns | values) for key in keys} | data.draw(rows)
    check(row, name)


@pytest.mark.parametrize("name", FORMATS)
def test_every_hostile_value_in_every_place(name: str) -> None:
    for value in HOSTILE + MONSTERS:
        check(value, name)
        for keys in FORMATS[name].keys:
            check(dict.fromkeys(keys, value), name)
            for key in KEYS:
                turn = {
                    "role": "assistant",
                    "from": "gpt",
                    "content": "c",
                    "value": "v",
                    "input": "i",
                    "output": "o",
                    key: value,
                }
                check({**{place: [turn] for place in keys}, key: value}, name)
                check({**dict.fromkeys(keys, "text"), key: value}, name)
                tree = {"text": "q", "role": "prompter", "replies": [{"text": "a", "role": "assistant", key: value}]}
                check({**dict.fromkeys(keys, tree), "message_tree_id": "1"}, name)


ids = st.sampled_from(["a", "b", "c", "d"])
messages_of_a_file = st.lists(
    st.fixed_dictionaries(
        {"message_id": ids | leaves, "text": leaves, "role": st.sampled_from(["prompter", "assistant"]) | leaves},
        optional={"parent_id": ids | leaves},
    ),
    max_size=8,
)


@fuzz
@given(messages_of_a_file)
def test_flat_messages_are_all_accounted_for(messages: list[dict]) -> None:
    assembled = list(assemble_rows(enumerate(messages)))

    def size(row: dict) -> int:
        waiting, count = [row.get("prompt", row)], 0
        while waiting:
            count += 1
            waiting += waiting.pop().get("replies", [])
        return count

    assert sum(size(row) for _, row in assembled) == len(messages)
    for _, row in assembled:
        check(row)


json_like = st.text(st.sampled_from('[]{}:,"0e.-\\ntfu \n\ud83d'.replace("\ud83d", "d8")), max_size=40).map(str.encode)
starts = st.sampled_from([b"", b"[", b"{", b"\xef\xbb\xbf", b"PK\x03\x04", b"\x1f\x8b\x08\x00", b"PAR1", b"\xff\xfe"])
contents = st.tuples(starts, st.binary(max_size=60) | json_like | rows.map(lambda row: dumped(row))).map(b"".join)


def dumped(row: Any) -> bytes:
    try:
        return json.dumps(row).encode()
    except (RecursionError, ValueError):
        return b"{}"


@pytest.mark.parametrize("name", ["rows.json", "rows.xlsx"])
@fuzz
@given(content=contents, packed=st.booleans())
def test_any_file_gives_rows_or_an_input_error(tmp_path: Path, name: str, content: bytes, packed: bool) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if packed else content)
    try:
        found = read_rows(path)
    except InputError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
    else:
        assert found
        for row in found:
            check(row)


def test_a_damaged_workbook_gives_rows_or_an_input_error(tmp_path: Path) -> None:
    from openpyxl import Workbook

    path = tmp_path / "rows.xlsx"
    workbook = Workbook()
    for row in (["Question", "Answer"], *(["q", "a"] for _ in range(20))):
        workbook.active.append(row)
    workbook.save(path)
    whole = path.read_bytes()
    assert len(read_rows(path)) == 20
    for position in range(0, len(whole), 37):
        for damaged in (whole[:position], whole[:position] + b"\x00\xff" + whole[position + 2 :]):
            path.write_bytes(damaged)
            try:
                for row in read_rows(path):
                    check(row)
            except InputError as error:
                assert str(path) in str(error)
