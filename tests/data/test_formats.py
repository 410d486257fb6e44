from __future__ import annotations

import json
from pathlib import Path

import pytest

from course_lib.data.conversation import RowError
from course_lib.data.dataset import load_conversations
from course_lib.data.formats import (
    FORMATS,
    check_format_name,
    detect_format,
    to_conversation,
)
from course_lib.data.report import DataReport
from course_lib.errors import InputError
from course_lib.recipe import DataSettings

ROW = {"instruction": "Say hi", "output": "hi"}


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


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
        ({"instruction": "x", "output": 3}, "is a number, not text"),
        ({"messages": []}, "no messages"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "unknown role 'usr'.*did you mean user"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no output"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "content is an array"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}, "must come first"),
        ({"messages": ["hello"]}, "is text, not an object"),
        ({"conversation": {}}, "is an object, not a list"),
        ({"conversation": [3]}, "turn 1 is a number"),
        ({"question": "x", "answer": "y"}, "no known format has the keys answer, question"),
        ([1, 2], "row is an array"),
        (None, "row is null"),
        ({"text": "Preface ### Human: q### Assistant: a"}, "does not begin with.*'Preface.*set format text"),
        ({"text": "### Human: q"}, "no output"),
        ({"text": " \n "}, "'text' is blank"),
        ({"text": 3}, "'text' is a number, not text: 3"),
        ({"text": "half \ud83d"}, "lone surrogate U\\+D83D at character 6"),
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


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": [], "prompt": "p", "prompt_id": "1"}),
        ("sharegpt", {"conversations": []}),
        ("xtuner", {"conversation": []}),
        ("alpaca", {"instruction": "i", "input": "", "output": "o", "text": "Below is an instruction"}),
        ("alpaca", {"instruction_zh": "i", "output_zh": "o"}),
        ("oasst", {"message_tree_id": "1", "prompt": {}}),
        ("oasst", {"message_id": "1", "parent_id": None, "text": "t", "role": "prompter"}),
        ("prompt_completion", {"prompt": "p", "completion": "c"}),
        ("medqa", {"Question": "q", "Answer": "a"}),
        ("guanaco", {"text": "### Human: q### Assistant: a"}),
        ("text", {"text": "# Title\n## Part\n### Heading"}),
    ],
)
def test_formats_are_told_by_their_keys(name: str, row: dict) -> None:
    assert detect_format(row) == name


def test_no_format_is_told_with_all_that_are_known() -> None:
    with pytest.raises(RowError) as caught:
        detect_format({"a\nb": 1, "c" * 100: 2})
    for name, row_format in FORMATS.items():
        assert name in str(caught.value)
        assert row_format.description
    assert "'a\\nb'" in str(caught.value)
    with pytest.raises(InputError, match="guanaco \\(text with.*did you mean guanaco"):
        check_format_name("guanako")


def test_marks_tell_dialogue_from_plain_text_unless_the_format_is_named() -> None:
    text = "### Human: q### Assistant: a"
    assert to_conversation({"text": text}, row_format="text") == {"text": text}
    assert to_conversation({"text": " plain\x00\ttext \n"}) == {"text": " plain\x00\ttext \n"}
    with pytest.raises(RowError, match="does not begin with"):
        to_conversation({"text": "no turns here"}, row_format="guanaco")


def test_the_unanswered_last_turn_is_noted() -> None:
    notes: list[str] = []
    to_conversation({"text": "### Human: q### Assistant: a### Human: r### Human: s"}, notes=notes)
    assert notes == ["the last user turn, which has no answer, left off"]


def test_alpaca_history_system_placeholders_and_chinese() -> None:
    notes: list[str] = []
    row = {"instruction": "i", "input": "< noInput >", "output": "o", "system": "S", "history": [["q", "a"]]}
    assert to_conversation(row, notes=notes)["messages"] == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "i"},
        {"role": "assistant", "content": "o"},
    ]
    assert notes == ["'<noinput>' read as no input"]
    both = {"instruction": "i", "output": "o", "instruction_zh": "指", "input_zh": "入", "output_zh": "出"}
    assert to_conversation(both, notes=notes)["messages"][1]["content"] == "o"
    assert "alpaca_zh" in notes[-1]
    assert to_conversation(both, row_format="alpaca_zh")["messages"][0]["content"] == "指\n\n入"


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
SCHEMA = {"name": "f", "description": "d", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": SCHEMA}


def test_sharegpt_calls_observations_and_tools() -> None:
    turns = [
        {"from": "system", "value": "S"},
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "1"},
        {"from": "function_call", "value": '[{"name": "f", "arguments": "{\\"x\\": 1}"}, {"name": "g"}]'},
        {"from": "tool", "value": "2"},
        {"from": "gpt", "value": "a"},
    ]
    bare_call = {"type": "function", "function": {"name": "g", "arguments": {}}}
    expected = {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "", "tool_calls": [CALL, bare_call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "a"},
        ],
        "tools": [TOOL],
    }
    for tools in ([SCHEMA], json.dumps([SCHEMA]), [TOOL], json.dumps(TOOL)):
        assert to_conversation({"conversations": turns, "tools": tools, "system": "S"}) == expected
    for tools in ("", "[]", [], None):
        assert "tools" not in to_conversation({"conversations": turns, "tools": tools})


def test_openai_tools_new_and_old_parts_and_weight() -> None:
    new = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
            },
            {"role": "tool", "content": "1", "tool_call_id": "c1"},
            {"role": "assistant", "content": "no", "weight": 0, "refusal": None},
            {"role": "assistant", "content": "a", "reasoning": "r"},
        ],
        "tools": [TOOL],
    }
    notes: list[str] = []
    assert to_conversation(new, notes=notes) == {
        "messages": [
            {"role": "system", "content": "ab"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **CALL}]},
            {"role": "tool", "content": "1", "tool_call_id": "c1"},
            {"role": "assistant", "content": "no", "train": False},
            {"role": "assistant", "content": "a"},
        ],
        "tools": [TOOL],
    }
    assert notes == ["keys of a turn left out: reasoning"]
    old = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
            {"role": "function", "name": "f", "content": "1"},
        ],
        "functions": [SCHEMA],
    }
    assert to_conversation(old) == {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "f", "content": "1"},
        ],
        "tools": [TOOL],
    }
    for row in (new, old):
        assert to_conversation(to_conversation(row)) == to_conversation(row)


def test_prompt_and_completion_as_text_and_as_messages() -> None:
    expected = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]
    assert to_conversation({"prompt": "p", "completion": "c"})["messages"] == expected
    row = {"prompt": expected, "completion": [{"role": "assistant", "content": "d"}]}
    assert to_conversation(row)["messages"] == [
        expected[0],
        {**expected[1], "train": False},
        {"role": "assistant", "content": "d"},
    ]
    assert "train" not in expected[1]


def test_xtuner_turns_without_loss() -> None:
    row = {"conversation": [{"input": "a", "output": "b", "output_with_loss": False}, {"input": "", "output": "d"}]}
    notes: list[str] = []
    assert to_conversation(row, notes=notes)["messages"][1::2] == [
        {"role": "assistant", "content": "b", "train": False},
        {"role": "assistant", "content": "d"},
    ]
    assert "empty input" in notes[0]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "i", "output": "<nooutput>"}, "no output: 'output' is '<nooutput>'"),
        ({"instruction": " ", "output": "o"}, "both blank"),
        ({"instruction_zh": "i"}, "no 'output_zh'"),
        ({"instruction": "i", "output": "o", "history": [["q"]]}, r"history 1 is not \[question, answer\]: \['q'\]"),
        ({"instruction": "i", "output": "o", "history": "h"}, "history is text, not a list of pairs"),
        ({"conversations": "[{}]"}, "turn 1: unknown speaker None"),
        ({"conversations": {}}, "conversations is an object, not a list of turns"),
        ({"conversations": [{"from": "humman", "value": "x"}]}, "turn 1: unknown speaker 'humman'.*did you mean human"),
        ({"conversations": [{"from": "gpt"}]}, r"turn 1 \(gpt\) has no 'value'"),
        (
            {"conversations": [{"from": "function_call", "value": '{"name": f}'}]},
            r"turn 1 \(function_call\): broken JSON: Expecting value at character 10",
        ),
        (
            {"conversations": [{"from": "function_call", "value": '{"name": "f", "arguments": "{x}"}'}]},
            r"turn 1 \(function_call\), call 1: arguments: broken JSON",
        ),
        (
            {"conversations": [{"from": "function_call", "value": '{"name": "f", "arguments": [1]}'}]},
            "is not an object",
        ),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "name is null, not text"),
        ({"conversations": [{"from": "function_call", "value": "3"}]}, "is a number, not a list of calls: 3"),
        ({"conversations": [{"from": "gpt", "value": "x"}], "tools": "[{]"}, "tools: broken JSON"),
        ({"conversations": [{"from": "gpt", "value": "x"}], "tools": [{"x": 1}]}, "tool 1 is not"),
        (
            {"conversations": [{"from": "system", "value": "A"}, {"from": "gpt", "value": "x"}], "system": "B"},
            "two system texts: 'B' and, in turn 1, 'A'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            r"message 1 \(user\): content part 1 is 'image_url': only text",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "only the assistant calls tools"),
        ({"messages": [{"role": "assistant", "content": "x", "train": "no"}]}, "train is 'no', not true or false"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}, "weight is 0.5, not 0 or 1"),
        ({"messages": [{"role": "assistant", "content": "a\udc00"}]}, r"message 1 \(assistant\): content has the lone"),
        ({"messages": [{"role": "assistant", "content": "x"}], "tools": [TOOL], "functions": [SCHEMA]}, "keep one"),
        (
            {"prompt": "p", "completion": [{"role": "assistant", "content": "c"}]},
            "prompt is text, not a list of messages",
        ),
        ({"prompt": [{"role": "user", "content": "p"}], "completion": []}, "no assistant turn in 'completion'"),
        ({"conversation": [{"input": "a", "output": "b", "output_with_loss": 0}]}, "output_with_loss is 0, not true"),
        (
            {"conversation": [{"input": "1", "output": "2"}, {"system": "S", "input": "3", "output": "4"}]},
            "turn 2: system differs from the first turn's",
        ),
        ({"Question": "q", "Answer": "No Answers."}, "no answer: 'Answer' is 'No Answers.'"),
        ({"Question": " ", "Answer": "a"}, "no 'Question'"),
    ],
)
def test_more_rows_that_do_not_fit_say_why(row: object, said: str) -> None:
    with pytest.raises(RowError, match=said) as caught:
        to_conversation(row)
    assert "\n" not in str(caught.value)


def test_deep_schemas_are_refused_before_they_break_a_template() -> None:
    deep: dict = {}
    for _ in range(5000):
        deep = {"x": deep}
    with pytest.raises(RowError, match="nested more than 100 levels"):
        to_conversation({"conversations": [{"from": "gpt", "value": "x"}], "tools": [{**SCHEMA, "parameters": deep}]})


def test_the_report_counts_notes_beside_dropped_rows(tmp_path: Path) -> None:
    lines = [
        '{"text": "### Human: q### Assistant: a### Human: r"}',
        '{"text": "plain", "text": "last"}',
        '{"text": ""}',
    ]
    path = written(tmp_path / "a.jsonl", "\n".join(lines))
    report = DataReport()
    table, _ = load_conversations(DataSettings(path=str(path), on_bad_row="drop"), report=report)
    kept = [(row["row"], json.loads(row["conversation"])) for row in table if row["conversation"]]
    assert kept[1] == (2, {"text": "last"})
    assert report.read == 3
    assert report.dropped == {"'text' is blank: nothing to train": [3]}
    assert list(report.notes.values()) == [[2], [1]] or list(report.notes.values()) == [[1], [2]]
    assert "; noted: the last user turn, which has no answer, left off: row 1" in report.summary()
