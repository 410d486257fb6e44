"""Real files, every row accounted for. Nothing of them is copied here; counts were taken from the files by other means."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from course_lib.data.conversation import Conversation
from course_lib.data.dataset import load_conversations
from course_lib.data.report import DataReport
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
