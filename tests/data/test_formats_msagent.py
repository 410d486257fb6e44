"""MSAgent-Bench rows: what becomes of them, and that they and ShareGPT's, which share a key, are told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from course_lib.data.conversation import RowError
from course_lib.data.dataset import load_conversations
from course_lib.data.formats import detect_format, to_conversation
from course_lib.data.formats_msagent import (
    ADDRESS_LEFT_OUT,
    BRACKETS_LEFT_OUT,
    RULES_LEFT_OFF,
    UNLISTED,
)
from course_lib.data.report import DataReport
from course_lib.data.tokenize import IGNORE_INDEX, encode_conversation
from course_lib.recipe import DataSettings

RULES = "You can call plugins. Write JSON with api_name and parameters between <|startofthink|> and <|endofthink|>:\n\n"
WEATHER = {
    "name": "weather",
    "description": "Weather of a city",
    "parameters": [
        {"name": "city", "description": "a city", "required": "True"},
        {"name": "days", "description": "how many", "type": "integer", "required": "False"},
    ],
}


def call(name: str, arguments: Any, **more: Any) -> str:
    return (
        f"<|startofthink|>```JSON\n{json.dumps({'api_name': name, **more, 'parameters': arguments})}\n```<|endofthink|>"
    )


def result(text: str) -> str:
    return f"\n\n<|startofexec|>```JSON\n{text}\n```<|endofexec|>\n"


def row(*said: str, system: str | None = None) -> dict[str, Any]:
    """Turns of user and assistant in turn, after a system turn that lists the weather tool."""
    system = RULES + f"1. {json.dumps(WEATHER)}" if system is None else system
    speakers = ["user", "assistant"] * len(said)
    turns = [{"from": who, "value": text} for who, text in zip(speakers, said, strict=False)]
    return {"id": "1", "conversations": [{"from": "system", "value": system}, *turns]}


def converted(given_row: Any) -> tuple[Any, list[str]]:
    notes: list[str] = []
    return to_conversation(given_row, notes=notes), notes


def test_one_call_its_result_and_the_answer() -> None:
    found, notes = converted(
        row("Weather in Ulm?", "I look it up." + call("weather", {"city": "Ulm"}) + result('{"t": 9}') + "It is 9 °C.")
    )
    assert found["messages"] == [
        {"role": "user", "content": "Weather in Ulm?"},
        {
            "role": "assistant",
            "content": "I look it up.",
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}],
        },
        {"role": "tool", "name": "weather", "content": '{"t": 9}'},
        {"role": "assistant", "content": "It is 9 °C."},
    ]
    assert found["tools"] == [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "Weather of a city",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "city": {"description": "a city"},
                        "days": {"description": "how many", "type": "integer"},
                    },
                    "required": ["city"],
                },
            },
        }
    ]
    assert notes == [RULES_LEFT_OFF]


def test_several_calls_in_one_message_one_after_the_other_and_together() -> None:
    ulm, bonn = call("weather", {"city": "Ulm"}), call("weather", {"city": "Bonn"})
    in_turn, _ = converted(row("Both?", ulm + result("9") + "Now Bonn." + bonn + result("12") + "9 and 12."))
    together, _ = converted(row("Both?", ulm + "\n" + bonn + result("9") + result("12") + "9 and 12."))
    roles = [[message["role"] for message in found["messages"]] for found in (in_turn, together)]
    assert roles == [
        ["user", "assistant", "tool", "assistant", "tool", "assistant"],
        ["user", "assistant", "tool", "tool", "assistant"],
    ]
    assert in_turn["messages"][3]["content"] == "Now Bonn."
    cities = [one["function"]["arguments"]["city"] for one in together["messages"][1]["tool_calls"]]
    assert (cities, [message["content"] for message in together["messages"][2:4]]) == (["Ulm", "Bonn"], ["9", "12"])


def test_a_plain_answer_and_further_turns() -> None:
    found, _ = converted(
        row("Hello", "Hello!", "Weather in Ulm?", call("weather", {"city": "Ulm"}) + result("9") + "9 °C.")
    )
    assert [message["role"] for message in found["messages"]] == ["user", "assistant"] * 2 + ["tool", "assistant"]
    assert found["messages"][1] == {"role": "assistant", "content": "Hello!"}


def test_a_row_without_tools_keeps_its_system_text() -> None:
    system = "You are Jerry, and <|startofthink|> means nothing today."
    found, notes = converted(row("Hi", "Hi!", system=system))
    assert found["messages"][0] == {"role": "system", "content": system}
    assert "tools" not in found
    assert notes == []


def test_a_row_may_end_with_a_call() -> None:
    found, _ = converted(row("Weather in Ulm?", call("weather", {"city": "Ulm"})))
    assert found["messages"][-1]["tool_calls"][0]["function"]["name"] == "weather"


PLUGIN = {
    "plugin_name": "weather",
    "plugin_owner": "someone",
    "plugin_schema_for_model": {key: value for key, value in WEATHER.items() if key != "name"},
}
IN_PATHS = {
    "plugin_name": "p",
    "plugin_schema_for_model": {
        "name": "weather",
        "description": WEATHER["description"],
        "url": "http://example.org",
        "paths": [{"name": "m", "method": "post", "parameters": WEATHER["parameters"]}],
    },
}
AS_SCHEMA = WEATHER | {
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"description": "a city"},
            "days": {"description": "how many", "type": "integer"},
        },
        "required": ["city"],
    }
}


@pytest.mark.parametrize("tool", [PLUGIN, IN_PATHS, AS_SCHEMA])
def test_tools_in_their_other_forms_come_out_the_same(tool: dict[str, Any]) -> None:
    bare, _ = converted(row("Hi", "Hi!"))
    other, _ = converted(row("Hi", "Hi!", system=RULES + f"1. {json.dumps(tool)}"))
    assert other["tools"] == bare["tools"]


def test_closing_brackets_too_many_are_left_out() -> None:
    whole = json.dumps(WEATHER)
    plugin = json.dumps({"plugin_name": "weather", "plugin_schema_for_model": WEATHER})
    bare, _ = converted(row("Hi", "Hi!"))
    for system in (f"1. {whole}]}}\n\n2. {whole}", f"1. {plugin[:-1]}]}}}} 2. {whole}]}}]}}"):
        found, notes = converted(row("Hi", "Hi!", system=RULES + system))
        assert found["tools"] == bare["tools"] * 2
        assert notes == [BRACKETS_LEFT_OUT, RULES_LEFT_OFF]


def test_brackets_and_quotes_inside_texts_of_a_tool_are_texts() -> None:
    tool = WEATHER | {"description": 'a \\ }]} {"name": "b"} \\" end'}
    found, notes = converted(row("Hi", "Hi!", system=RULES + f"1. {json.dumps(tool)}"))
    assert [one["function"]["description"] for one in found["tools"]] == [tool["description"]]
    assert notes == [RULES_LEFT_OFF]


def test_notes_say_what_was_read_in_another_way() -> None:
    _, notes = converted(
        row("Hi", call("other", {}, url="http://example.org", extra=1) + result("1") + "1", "and you?")
    )
    assert notes[0] == ADDRESS_LEFT_OUT
    assert "extra" in notes[1]
    assert notes[2] == RULES_LEFT_OFF
    assert "no answer, left off" in notes[3]
    assert notes[4] == UNLISTED


@pytest.mark.parametrize("write", [json.dumps, repr, lambda value: json.dumps(value, ensure_ascii=False, indent=1)])
def test_conversations_may_be_text(write: Any) -> None:
    as_list = row("乌尔姆的天气？", call("weather", {"city": "乌尔姆", "days": None}) + result("9") + 'It\'s "9" °C.')
    as_text = as_list | {"conversations": write(as_list["conversations"])}
    assert detect_format(as_text) == "msagent"
    assert converted(as_text) == converted(as_list)


def test_nothing_in_a_text_is_run(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    for text in (
        f"[{{'from': 'user', 'value': open({str(trap)!r}, 'w')}}]",
        f"__import__('pathlib').Path({str(trap)!r}).touch()",
        "[" * 100_000,
        "-" * 100_000 + "1",
        "9" * 10_000,
        "[{'from': 'user', 'value': 2 ** 9}]",
        "[{'from': 'user', 'value': b'x'}]",
        "[{'from': 'user', 'value': {1}}]",
        "[{1: 2}]",
        "",
    ):
        with pytest.raises(RowError, match="conversations"):
            to_conversation({"conversations": text})
    assert not trap.exists()


ONE = call("weather", {"city": "Ulm"})


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (row("Hi", ONE + "It rains."), "message 3 \\(assistant\\): a call before it has no result"),
        (row("Hi", ONE, "Well?", "Rain."), "message 3 \\(user\\): a call before it has no result"),
        (row("Hi", ONE + ONE + result("1") + "Rain."), "a call before it has no result"),
        (row("Hi", result("1") + "Rain."), "turn 3 \\(assistant\\): a result without a call: '1'"),
        (row("Hi", ONE + result("1") + result("2") + "Rain."), "a result without a call: '2'"),
        (row("Hi", ONE + "so" + result("1") + "Rain."), "words between a call and its result: 'so'"),
        (row("Hi", "<|startofthink|>{}"), "turn 3 \\(assistant\\): <\\|startofthink\\|> without its other half"),
        (row("Hi", "<|startofexec|>1<|endofthink|>"), "without its other half"),
        (row("Hi", "<|startofthink|>I must think<|endofthink|>"), "turn 3 \\(assistant\\): call: broken JSON"),
        (row("Hi", '<|startofthink|>{"name": "x"}<|endofthink|>'), "not an object with api_name"),
        (row("Hi", call("weather", "Ulm")), "arguments: broken JSON"),
        (row("Hi", call("weather", [1])), "arguments is not an object"),
        (row("Hi", call("", {})), "name is empty"),
        (row("Hi"), "no output"),
        (row("Hi", "Hi!", system=RULES + '1. {"name": "x", "parameters": [{"name": "y"'), "tool 1: broken JSON"),
        (
            row("Hi", "Hi!", system=RULES + '1. {"name": "x", "parameters": ["y"]}'),
            "tool 1: a parameter is not an object",
        ),
        (
            row("Hi", "Hi!", system=RULES + '{"plugin_name": "x", "plugin_schema_for_model": 3}'),
            "is a number, not an object",
        ),
        (
            row("Hi", "Hi!", system=RULES + '{"name": "x", "paths": [{}, {}]}'),
            "tool 1: paths is not a list of one object",
        ),
        (row("Hi", "Hi!", system=RULES + "<|user|>: a\n<|assistant|>: b"), "holds turns of its own, '<\\|user\\|>:'"),
        ({"conversations": "[{'from': 'human', 'value': 'x'}]"}, "turn 1: unknown speaker 'human'"),
        ({"conversations": "{}"}, "conversations is an object, not a list of turns"),
        ({"conversations": "['x']"}, "turn 1 is text, not an object"),
    ],
)
def test_rows_that_do_not_fit_say_why(bad: dict[str, Any], said: str) -> None:
    assert detect_format(bad) == "msagent"
    with pytest.raises(RowError, match=said):
        to_conversation(bad)


def test_every_row_of_a_file_is_accounted_for(tmp_path: Path) -> None:
    rows = [row("Hi", "Hi!"), row("Hi", ONE + "so" + result("1") + "Rain."), row("Hi", ONE + result("1") + "Rain.")]
    rows += [row("Hi", ONE + "now" + result("1") + "Rain.")] * 2
    path = tmp_path / "dev.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    report = DataReport()
    load_conversations(DataSettings(path=str(path), on_bad_row="drop"), report=report)
    assert report.read == 5
    assert sorted(report.dropped.values()) == [[2], [4, 5]]


def test_what_a_tool_says_is_not_trained(tokenizer: Any) -> None:
    from course_lib.data.templates import named_template

    secret = "zebra"
    found, _ = converted(row("Weather in Ulm?", ONE + result(secret) + "It is 9 °C."))
    example = encode_conversation(found, named_template("qwen_chat"), tokenizer)
    trained = tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])
    assert secret in tokenizer.decode(example.input_ids)
    assert secret not in trained
    assert "weather" in trained
    assert "It is 9 °C." in trained


texts = st.text(st.sampled_from('ab \n{}[]",:<|>`和') | st.characters(codec="utf-8"), max_size=30)
plain = texts.filter(lambda text: text.strip() and "<|" not in text)


@st.composite
def msagent_rows(draw: st.DrawFn) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row, and the messages it stands for."""
    said, expected = [], []
    for _ in range(draw(st.integers(1, 3))):
        question = draw(plain)
        expected.append({"role": "user", "content": question.strip()})
        value = ""
        for _ in range(draw(st.integers(0, 2))):
            words = draw(st.sampled_from(["", "Let me see."]))
            calls = draw(st.lists(st.dictionaries(st.sampled_from(["city", "days"]), texts), min_size=1, max_size=2))
            results = [draw(st.sampled_from(['{"t": 9}', "rain", "雨"])) for _ in calls]
            value += words + " ".join(call("weather", arguments) for arguments in calls) + "".join(map(result, results))
            made = [{"type": "function", "function": {"name": "weather", "arguments": one}} for one in calls]
            expected.append({"role": "assistant", "content": words, "tool_calls": made})
            expected += [{"role": "tool", "name": "weather", "content": text} for text in results]
        answer = draw(plain)
        expected.append({"role": "assistant", "content": answer.strip()})
        said += [question, value + answer]
    return row(*said), expected


@settings(max_examples=80, deadline=None)
@given(msagent_rows(), st.sampled_from([lambda value: value, json.dumps, repr]))
def test_any_row_comes_out_as_what_it_stands_for(made: tuple[dict[str, Any], list[Any]], write: Any) -> None:
    given_row, expected = made
    given_row["conversations"] = write(given_row["conversations"])
    assert detect_format(given_row) == "msagent"
    assert converted(given_row)[0]["messages"] == expected


sharegpt_speakers = st.sampled_from(
    ["human", "gpt", "function_call", "observation", "system", "user", "assistant", "tool"]
)
sharegpt_rows = st.fixed_dictionaries(
    {
        "conversations": st.lists(
            st.fixed_dictionaries({"from": sharegpt_speakers, "value": plain}), min_size=1, max_size=4
        )
    },
    optional={"tools": st.just('[{"name": "f"}]'), "system": plain},
)


@settings(max_examples=80, deadline=None)
@given(sharegpt_rows)
def test_sharegpt_stays_sharegpt(given_row: dict[str, Any]) -> None:
    assert detect_format(given_row) == "sharegpt"


@pytest.mark.parametrize(
    "turns",
    [
        [
            {"from": "human", "value": "what is <|startofthink|>?"},
            {"from": "gpt", "value": "<|startofthink|> begins a call"},
        ],
        [{"from": "user", "value": "what is <|startofthink|>?"}, {"from": "assistant", "value": "A mark."}],
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<|startofthink|>"}],
    ],
)
def test_a_sharegpt_row_that_only_speaks_of_the_marks(turns: list[dict[str, str]]) -> None:
    assert detect_format({"conversations": turns}) == "sharegpt"
    assert to_conversation({"conversations": turns})["messages"][-1]["role"] == "assistant"
