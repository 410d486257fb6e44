"""Real files, every row accounted for. Nothing of them is copied here; counts were taken from the files by other means."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from course_lib.agent.protocol import choose_protocol
from course_lib.data.conversation import Conversation
from course_lib.data.dataset import load_conversations
from course_lib.data.report import DataReport
from course_lib.data.templates import named_template, render
from course_lib.recipe import DataSettings

pytestmark = pytest.mark.realdata


def loaded(path: Path) -> tuple[list[tuple[int, Conversation]], DataReport]:
    report = DataReport()
    table, _ = load_conversations(DataSettings(path=str(path), on_bad_row="drop"), report=report)
    kept = [(row["row"], json.loads(row["conversation"])) for row in table if row["conversation"]]
    assert len(kept) + sum(map(len, report.dropped.values())) == report.read
    return kept, report


def test_guanaco(real_data: Path) -> None:
    kept, report = loaded(real_data / "openassistant_guanaco_1k.jsonl")
    assert (report.read, len(kept), report.notes) == (1000, 1000, {})
    answers = [sum(message["role"] == "assistant" for message in row["messages"]) for _, row in kept]
    assert sum(count > 1 for count in answers) == 353


def test_tool_calls(real_data: Path) -> None:
    kept, report = loaded(real_data / "glaive_toolcall_en_demo.json")
    assert (report.read, len(kept), report.notes) == (300, 300, {})
    messages = [message for _, row in kept for message in row["messages"]]
    assert Counter(message["role"] for message in messages) == {"user": 746, "assistant": 746 + 211, "tool": 211}
    calls = [call for message in messages for call in message.get("tool_calls", [])]
    assert len(calls) == 211
    for _, row in kept:
        names = {tool["function"]["name"] for tool in row.get("tools", [])}
        called = {call["function"]["name"] for message in row["messages"] for call in message.get("tool_calls", [])}
        assert called <= names
    assert sum(len(row.get("tools", [])) for _, row in kept) == 219


@pytest.mark.parametrize("protocol", ["native", "react", "react_en", "react_zh", "react_brief"])
def test_tool_calls_are_all_written_and_read_back_by_every_protocol(
    real_data: Path, protocol: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Each of the 300 conversations through a protocol and a template: a call is read from the very text that is trained."""
    template = named_template("qwen_chat" if protocol == "native" else "chatml")
    chosen = choose_protocol(protocol, template, tokenizer)
    kept, _ = loaded(real_data / "glaive_toolcall_en_demo.json")
    calls = answers = 0
    for _, row in kept:
        written = chosen.render(row)
        rendered = render(written["messages"], template, tokenizer, written.get("tools"))
        turns = [message for message in row["messages"] if message["role"] == "assistant"]
        for (start, end), message in zip(rendered.answers, turns, strict=True):
            text = rendered.text[start:end].removesuffix("<|im_end|>")
            if not row.get("tools"):
                assert text == message["content"]
                continue
            turn = chosen.read_turn(text)
            made = [one["function"] for one in message.get("tool_calls", [])]
            assert [one["function"] for one in turn.calls] == made
            assert turn.calls or turn.answer == message["content"]
            calls += len(turn.calls)
            answers += not turn.calls
    said = [message for _, row in kept if row.get("tools") for message in row["messages"]]
    assert calls == 211
    assert answers == sum(one["role"] == "assistant" and not one.get("tool_calls") for one in said)


def test_alpaca(real_data: Path) -> None:
    kept, report = loaded(real_data / "alpaca_en_demo.json")
    assert (report.read, len(kept)) == (999, 999)
    assert all([message["role"] for message in row["messages"]] == ["user", "assistant"] for _, row in kept)


def test_sheet(real_data: Path) -> None:
    kept, report = loaded(real_data / "MedInfo2019-QA-Medications.xlsx")
    assert (report.read, len(kept), report.notes) == (690, 677, {})
    assert {number for number, _ in kept} | {row for rows in report.dropped.values() for row in rows} == set(
        range(2, 692)
    )
    assert Counter({reason: len(rows) for reason, rows in report.dropped.items()}) == {
        "no answer: 'Answer' is 'No answers'": 8,
        "no answer: 'Answer' is 'No Answers'": 1,
        "no answer: 'Answer' is 'Unanswerable'": 3,
        "no answer: 'Answer' is 'n/a'": 1,
    }
    texts = [message["content"] for _, row in kept for message in row["messages"]]
    assert not any("\N{NO-BREAK SPACE}" in text or text != text.strip() for text in texts)
