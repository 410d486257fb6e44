"""The samples of `data/`: what they hold, and that their builders make the very bytes that are committed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from course_lib.data.check import language_of
from course_lib.data.formats import iter_rows, read_rows, to_conversation
from course_lib.data.sources import SAMPLE_FOLDER, sample_rows
from course_lib.data.split import normal_question, split_file

SHEET = SAMPLE_FOLDER / "medication_qa_sample.xlsx"


@pytest.mark.parametrize(
    ("builder", "name"),
    [
        ("build_medication_qa_sample.py", "medication_qa_sample.xlsx"),
        ("build_openassistant_sample.py", "openassistant_sample.jsonl"),
        ("build_msagent_sample.py", "msagent_sample.jsonl"),
        ("build_msagent_sample.py", "msagent_test.jsonl"),
    ],
)
def test_a_builder_makes_the_committed_bytes(tmp_path: Path, builder: str, name: str) -> None:
    builder = SAMPLE_FOLDER / builder
    subprocess.run([sys.executable, str(builder), str(tmp_path / name)], check=True, timeout=60)
    assert (tmp_path / name).read_bytes() == (SAMPLE_FOLDER / name).read_bytes(), f"run python {builder}, and commit"


def test_the_sheet_has_the_columns_and_the_troubles_of_the_real_one() -> None:
    from openpyxl import load_workbook

    book = load_workbook(SHEET, read_only=True)
    header, *rows = book["DrugQA"].iter_rows(values_only=True)
    assert header == ("Question", "Focus (Drug)", "Question Type", "Answer", "Section Title", "URL")
    assert "not medical advice" in next(book["Note"].values)[0]
    assert len(rows) == 122
    answers = [row[3] for row in rows]
    assert sum("\u00a0" in answer for answer in answers) >= 4
    assert sum("\n" in answer for answer in answers) >= 6
    assert sum(answer != answer.strip() for answer in answers) >= 3
    assert sum(row[4] is None for row in rows) == 2
    assert sum(row[5] == "n/a" for row in rows) == 7
    assert all(row[5] == "n/a" or row[5].startswith("https://example.org/") for row in rows)


def test_the_sheet_is_read_and_split_the_same_on_every_machine(tmp_path: Path) -> None:
    shutil.copy(SHEET, tmp_path / "m.xlsx")
    split = split_file(tmp_path / "m.xlsx", seed=0)
    assert (split.report.read, split.report.kept, split.groups, len(split.repeated)) == (122, 115, 107, 8)
    assert sorted(row for rows in split.report.dropped.values() for row in rows) == list(range(117, 124))
    assert (split.train_rows, split.test_rows) == (81, 34)
    sides = [
        {normal_question(row["messages"][0]["content"]) for row in read_rows(part)}
        for part in (split.train, split.test)
    ]
    assert not sides[0] & sides[1]
    sha256 = [hashlib.sha256(part.read_bytes()).hexdigest()[:16] for part in (split.train, split.test)]
    assert sha256 == ["e800f574a218093d", "ab9ba04b0cd55f23"]


def test_answers_come_out_clean() -> None:
    for _, row in iter_rows(SHEET):
        assert "\u00a0" not in row["Answer"]
        assert row["Answer"] == row["Answer"].strip()
    assert to_conversation(next(iter_rows(SHEET))[1])["messages"][0]["content"] == "what is ibuprofen used for"


def asked(file_name: str) -> list[str]:
    rows = [to_conversation(row)["messages"] for row in sample_rows(file_name)]
    return [normal_question(message["content"]) for row in rows for message in row if message["role"] == "user"]


def test_the_conversations_are_many_a_third_multi_turn_and_in_two_languages() -> None:
    raw = sample_rows("openassistant_sample.jsonl")
    rows = [to_conversation(row, row_format="guanaco")["messages"] for row in raw]
    assert len(rows) == 202
    assert sum(len(row) > 2 for row in rows) == 68
    assert sum(language_of(row["text"]) in ("zh", "wuu") for row in raw) == 61
    assert all(row["text"].startswith("### Human: ") for row in raw)
    assert all(message["content"] == message["content"].strip() != "" for row in rows for message in row)


def test_no_question_stands_twice_or_in_the_other_sample_or_among_the_unseen_ones() -> None:
    questions = asked("openassistant_sample.jsonl")
    assert len(set(questions)) == len(questions)
    assert not set(questions) & set(asked("general_chat.json"))
    unseen = (
        "capital of france",
        "boiling point",
        "17 + 25",
        "photosynthesis",
        "largest planet",
        "hamlet",
        "primary colo",
        "who are you",
    )
    assert not [question for question in questions if any(words in question for words in unseen)]


def test_a_source_with_turns_out_of_order_is_refused() -> None:
    run = "import build_openassistant_sample as b; b.guanaco_text('H: a\\nH: b\\n', 'x.txt')"
    done = subprocess.run([sys.executable, "-c", run], cwd=SAMPLE_FOLDER, capture_output=True, text=True, timeout=60)
    assert "x.txt: turns are HH" in done.stderr
