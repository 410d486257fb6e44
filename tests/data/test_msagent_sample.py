"""The rows with tool calls: what they hold, that the test has nothing of the training, and that each result is the tool's own."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from course_lib.agent.evaluation import is_grounded
from course_lib.agent.protocol import choose_protocol
from course_lib.agent.tools import run_tool, shipped_tools
from course_lib.agent.turns import what_is_wrong
from course_lib.data.conversation import Conversation
from course_lib.data.formats import converted_rows, detect_format
from course_lib.data.sources import SAMPLE_FOLDER, sample_rows
from course_lib.data.split import normal_question
from course_lib.recipe import recipe_for

FILES = ("msagent_sample.jsonl", "msagent_test.jsonl")
CHINESE = re.compile("[一-鿿]")
LARGEST = 560_000  # bytes of a file


def conversations(name: str) -> list[Conversation]:
    """One a question: what is said up to the next question, with the row's tools."""
    found = [outcome for _, _, outcome, _ in converted_rows(enumerate(sample_rows(name), 1), row_format="msagent")]
    assert all(isinstance(one, dict) for one in found)
    out: list[Conversation] = []
    for row in found:
        assert row["messages"][0]["role"] == "user"
        for message in row["messages"]:
            if message["role"] == "user":
                out.append({"messages": [], "tools": row["tools"]})
            out[-1]["messages"].append(message)
    return out


def calls(row: Conversation) -> list[dict[str, Any]]:
    return [call["function"] for message in row["messages"] for call in message.get("tool_calls", [])]


def question(row: Conversation) -> str:
    return row["messages"][0]["content"]


def pattern(text: str) -> str:
    """A question without its numbers, names and units, roughly: what is left is its wording."""
    return re.sub(r"[A-Z][\w.]*|\d[\d.,:]*|[-+*/^()=;×÷＋]", "", text)


@pytest.mark.parametrize("name", FILES)
def test_rows_are_of_every_kind_in_two_languages_and_small(name: str) -> None:
    raw = sample_rows(name)
    assert {detect_format(row) for row in raw} == {"msagent"}
    assert any(isinstance(row["conversations"], str) for row in raw)
    assert any("plugin_schema_for_model" in str(row) for row in raw)
    assert (SAMPLE_FOLDER / name).stat().st_size < LARGEST
    rows = conversations(name)
    assert len(rows) >= 120
    kinds = Counter((bool(CHINESE.search(question(row))), len(calls(row))) for row in rows)
    assert set(kinds) == {(chinese, count) for chinese in (False, True) for count in (0, 1, 2)}
    assert min(kinds.values()) >= 6
    assert {call["name"] for row in rows for call in calls(row)} == {tool.name for tool in shipped_tools()}


def test_the_sample_has_three_questions_a_row_and_the_test_one() -> None:
    questions = [
        Counter(
            sum(turn["role"] == "user" for turn in row["messages"])
            for _, _, row, _ in converted_rows(enumerate(sample_rows(name), 1), row_format="msagent")
        )
        for name in FILES
    ]
    assert set(questions[1]) == {1}
    assert questions[0].total() - questions[0][3] <= 2  # the last of each language may have fewer


def test_no_question_wording_or_call_of_the_test_is_trained() -> None:
    trained, tested = (conversations(name) for name in FILES)
    asked = [{normal_question(question(row)) for row in rows} for rows in (trained, tested)]
    assert not asked[0] & asked[1]
    wordings = [{pattern(question(row)) for row in rows if len(calls(row)) == 1} for rows in (trained, tested)]
    assert not wordings[0] & wordings[1]
    # the Chinese names of cities are the same on both sides: nobody could tell the zone of a name never shown
    made = [
        {
            str(call)
            for row in rows
            for call in calls(row)
            if call["name"] != "clock" or not CHINESE.search(question(row))
        }
        for rows in (trained, tested)
    ]
    assert made[0] & made[1] == set()


@pytest.mark.parametrize("name", FILES)
def test_calls_fit_the_tools_that_ship_and_answers_their_results(name: str) -> None:
    shipped = {tool.name: tool for tool in shipped_tools()}
    protocol = choose_protocol("react_brief")
    for row in conversations(name):
        names = [tool["function"]["name"] for tool in row["tools"]]
        assert names == [one for one in shipped if one in names]
        assert len(names) == len(shipped) or "test" not in name
        rules = protocol.render(row)["messages"][0]["content"]
        ours = {**row, "tools": [shipped[one].schema for one in names]}
        assert (
            protocol.render(ours)["messages"][0]["content"] == rules
        )  # what the model is trained on is what chat feeds
        for call in calls(row):
            assert not what_is_wrong({"type": "function", "function": call}, ours["tools"])
        results = [message["content"] for message in row["messages"] if message["role"] == "tool"]
        answer = row["messages"][-1]["content"]
        assert len(results) == len(calls(row))
        assert not any(result.startswith("error") for result in results)
        if results:
            assert is_grounded(answer, reference=answer, question=question(row), results=results), (
                question(row),
                answer,
            )


@pytest.mark.parametrize("name", FILES)
def test_results_are_what_the_tools_return(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the clock's, which goes on, and the solver's, each of which starts a process: a few of those."""
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    shipped = {tool.name: tool for tool in shipped_tools()}
    solved = 0
    for row in conversations(name):
        results = [message["content"] for message in row["messages"] if message["role"] == "tool"]
        for call, result in zip(calls(row), results, strict=True):
            solved += call["name"] == "solve"
            if call["name"] == "clock" or (call["name"] == "solve" and solved > 2):
                continue
            assert run_tool(shipped[call["name"]], call["arguments"]).text == result


def test_the_cpu_recipe_asks_as_the_protocol_does() -> None:
    recipe = recipe_for("msagent_react", "cpu")
    row: Conversation = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
        "tools": [tool.schema for tool in shipped_tools()],
    }
    assert choose_protocol(recipe.data.protocol).render(row)["messages"][0]["content"] == recipe.evaluation.system
