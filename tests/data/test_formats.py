from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.data.conversation import RowError
from course_lib.data.formats import read_rows, to_conversation
from course_lib.errors import InputError

ROW = {"instruction": "Say hi", "output": "hi"}


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_json_array_in_a_jsonl_file_is_read_as_the_tutorial_writes_it(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path / "a.jsonl", json.dumps([ROW, ROW], indent=4))) == [ROW, ROW]


def test_json_lines_and_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path / "a.json", "\ufeff" + json.dumps(ROW) + "\n\n" + json.dumps(ROW) + "\n")) == [
        ROW,
        ROW,
    ]


def test_line_separators_inside_a_string_do_not_split_the_row(tmp_path: Path) -> None:
    row = {"instruction": "a\u2028b\x85c", "output": "d"}
    assert read_rows(written(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False))) == [row]


def test_one_object_over_several_lines(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path / "a.json", json.dumps(ROW, indent=2))) == [ROW]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        (" \n ", "is empty"),
        ("[]", "empty list"),
        ('[{"a": 1},\n {"b": }]', "line 2, column 8"),
        ('{"a": 1}\n{"b": 2\n', "line 2, column 8"),
        ("[" * 100_000, "nested too deeply"),
        ("caf\xe9".encode("latin-1"), "byte 0xE9 at line 1, column 4"),
        (b'{"a": 1}\n{"b": "\xff"}', "line 2, column 8"),
    ],
)
def test_files_that_cannot_be_read_say_where(tmp_path: Path, content: str | bytes, said: str) -> None:
    path = written(tmp_path / "rows.json", content)
    with pytest.raises(InputError, match=said) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_rows(tmp_path / "absent.json")
    with pytest.raises(InputError, match="is a folder"):
        read_rows(tmp_path)


def test_every_format_becomes_messages() -> None:
    expected = [{"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "hi"}]
    rows = [
        ROW,
        {"messages": expected},
        {"conversation": [{"input": "Say hi", "output": "hi"}]},
        {"text": "### Human: Say hi### Assistant: hi"},
    ]
    assert [to_conversation(row)["messages"] for row in rows] == [expected] * len(rows)


def test_alpaca_input_follows_the_instruction() -> None:
    conversation = to_conversation({"instruction": "Translate", "input": "cat", "output": "猫"})
    assert conversation["messages"][0]["content"] == "Translate\n\ncat"


def test_xtuner_system_comes_once_and_first() -> None:
    turns = [{"system": "S", "input": "1", "output": "2"}, {"system": "S", "input": "3", "output": "4"}]
    roles = [message["role"] for message in to_conversation({"conversation": turns})["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]


def test_markdown_heading_in_a_guanaco_answer_survives() -> None:
    answer = "# A\n## B\n### C sub\nend"
    conversation = to_conversation({"text": f"### Human: q### Assistant: {answer}### Human: unanswered"})
    assert conversation["messages"] == [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "x"}, "no 'output'"),
        ({"instruction": "x", "output": None}, "no 'output'"),
        ({"instruction": "x", "output": "  "}, "no output"),
        ({"instruction": "x", "output": 3}, "is int, not text"),
        ({"messages": []}, "no messages"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "unknown role 'usr'.*did you mean user"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no output"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "content is list"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}, "must come first"),
        ({"messages": ["hello"]}, "is str, not an object"),
        ({"conversation": {}}, "is dict, not a list"),
        ({"conversation": [3]}, "turn 1 is int"),
        ({"question": "x", "answer": "y"}, "no known format has the keys answer, question"),
        ([1, 2], "row is list"),
        (None, "row is NoneType"),
        ({"text": "no turns here"}, "does not begin with"),
    ],
)
def test_rows_that_do_not_fit_say_why(row: object, said: str) -> None:
    with pytest.raises(RowError, match=said):
        to_conversation(row)


def test_forced_format_must_exist_and_fit() -> None:
    with pytest.raises(InputError, match="did you mean alpaca"):
        to_conversation(ROW, row_format="alpacca")
    with pytest.raises(RowError, match="has no 'messages'"):
        to_conversation(ROW, row_format="messages")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["messages", "conversation", "instruction", "output", "text", "input", "system"]), json_values
    )
)
def test_any_row_is_converted_or_refused_with_a_reason(row: dict) -> None:
    try:
        conversation = to_conversation(row)
    except RowError as reason:
        assert str(reason)
    else:
        assert any(
            message["role"] == "assistant" and message["content"].strip() for message in conversation["messages"]
        )
