"""The samples of `data/`: what they hold, and that their builders make the very bytes that are committed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from course_lib.data.formats import iter_rows, read_rows, to_conversation
from course_lib.data.sources import SAMPLE_FOLDER
from course_lib.data.split import normal_question, split_file

SHEET = SAMPLE_FOLDER / "medication_qa_sample.xlsx"


@pytest.mark.parametrize("name", ["medication_qa_sample.xlsx"])
def test_a_builder_makes_the_committed_bytes(tmp_path: Path, name: str) -> None:
    builder = SAMPLE_FOLDER / f"build_{name.split('.')[0]}.py"
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
