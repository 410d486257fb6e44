from __future__ import annotations

import json
from pathlib import Path

import pytest

from course_lib.data.check import language_of, length_histogram
from course_lib.data.conversation import RowError
from course_lib.data.near_duplicates import NearDuplicates
from course_lib.data.write import normal_question, split_file, to_xtuner
from course_lib.errors import InputError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def test_xtuner_form_keeps_the_system_text_in_the_first_turn() -> None:
    row = {"messages": [{"role": "system", "content": "S"}, USER, ANSWER, USER, ANSWER]}
    assert to_xtuner(row) == {
        "conversation": [{"system": "S", "input": "q", "output": "a"}, {"input": "q", "output": "a"}]
    }


@pytest.mark.parametrize(
    "row",
    [
        {"text": "plain"},
        {"messages": [USER, ANSWER, ANSWER]},
        {"messages": [USER, ANSWER], "tools": [{}]},
        {"messages": [ANSWER]},
    ],
)
def test_what_the_xtuner_form_has_no_place_for_is_refused(row: dict) -> None:
    with pytest.raises(RowError, match="XTuner"):
        to_xtuner(row)


def test_a_question_is_compared_without_case_spaces_and_final_marks() -> None:
    assert normal_question("What  IS\nthis? ") == normal_question("what is this") == normal_question("What is this？")
    assert normal_question("what is that") != normal_question("what is this")


def test_a_split_of_one_group_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps([{"instruction": "q", "output": str(number)} for number in range(4)]))
    with pytest.raises(InputError, match="nothing to split"):
        split_file(path)


@pytest.mark.realdata
def test_the_medication_sheet_splits_without_a_leak(real_data: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "medqa.xlsx"
    sheet.write_bytes((real_data / "MedInfo2019-QA-Medications.xlsx").read_bytes())
    split = split_file(sheet, test=0.3, seed=0)
    assert split.train_rows + split.test_rows == 677
    assert split.test_rows == pytest.approx(0.3 * 677, abs=3)
    sides = [
        {normal_question(json.loads(line)["messages"][0]["content"]) for line in part.open()}
        for part in (split.train, split.test)
    ]
    assert not sides[0] & sides[1]


def test_near_duplicates_are_told_from_different_rows() -> None:
    near = NearDuplicates()
    words = [f"w{number}" for number in range(100)]
    assert not near.seen(words)
    assert near.seen([*words[:-1], "changed"])
    assert not near.seen([f"other{number}" for number in range(100)])
    assert not near.seen([])
    assert not near.seen(list("一二三四五六七八九十"))
    assert near.seen(list("一二三四五六七八九十"))


def test_histogram_bins_double_and_leave_no_gap() -> None:
    assert length_histogram([1, 32, 33, 200]) == {"1-32": 2, "33-64": 1, "65-128": 0, "129-256": 1}
    assert length_histogram([]) == {}


def test_languages_of_several_scripts() -> None:
    samples = {
        "en": "The cat sat on the mat and looked out of the window.",
        "zh": "请介绍一下你自己，谢谢。",
        "ru": "Привет, как дела сегодня?",
    }
    assert {language_of(text): text for text in samples.values()}.keys() == samples.keys()
    assert language_of("12345 !!") == "und"
