from __future__ import annotations

import json
from pathlib import Path

import pytest

from course_lib.data.check import language_of, length_histogram
from course_lib.data.conversation import RowError
from course_lib.data.near_duplicates import NearDuplicates
from course_lib.data.write import convert_file, to_xtuner, with_system
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


def test_a_system_text_goes_before_rows_that_have_none() -> None:
    bare, own = {"messages": [USER, ANSWER]}, {"messages": [{"role": "system", "content": "own"}, USER, ANSWER]}
    assert with_system(bare, "S")["messages"] == [{"role": "system", "content": "S"}, USER, ANSWER]
    assert with_system(own, "S") is own
    assert with_system(bare, " ") is bare
    assert with_system({"text": "plain"}, "S") == {"text": "plain"}


def test_a_system_text_is_given_by_name_or_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": [USER, ANSWER]}))
    convert_file(tmp_path / "in.jsonl", tmp_path / "named.json", to="xtuner", system="doctor")
    turn = json.loads((tmp_path / "named.json").read_text())[0]["conversation"][0]
    assert turn["system"].startswith("You are a doctor who advises on medicines.")
    convert_file(tmp_path / "in.jsonl", tmp_path / "text.jsonl", system="You are a cook.")
    assert json.loads((tmp_path / "text.jsonl").read_text())["messages"][0]["content"] == "You are a cook."
    with pytest.raises(InputError, match="'doktor' is unknown.*did you mean doctor"):
        convert_file(tmp_path / "in.jsonl", tmp_path / "typo.jsonl", system="doktor")


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
