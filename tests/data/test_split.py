from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from course_lib.data.dataset import read_conversations
from course_lib.data.readers_sheet import iter_sheet_rows
from course_lib.data.split import choose_test, hash_order, normal_question, question_key, split_file
from course_lib.errors import InputError
from course_lib.recipe import DataSettings


def rows_file(path: Path, *pairs: tuple[str, str]) -> Path:
    path.write_text("\n".join(json.dumps({"instruction": asked, "output": answer}) for asked, answer in pairs))
    return path


def questions(path: Path) -> list[str]:
    return [json.loads(line)["messages"][0]["content"] for line in path.read_text().splitlines()]


def test_wrong_settings_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "r.json", ("a", "1"), ("b", "2"))
    for settings, said in (
        ({"test": 0}, "test share is 0"),
        ({"test": float("nan")}, "test share is nan"),
        ({"repeats": "longst"}, "did you mean longest"),
        ({"to": "xtunr"}, "did you mean xtuner"),
        ({"system": "doktor"}, "did you mean doctor"),
        ({"group_by": "topic"}, "no such field"),
        ({"row_format": "alpacca"}, "did you mean alpaca"),
    ):
        with pytest.raises(InputError, match=said):
            split_file(path, **settings)
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


def test_a_split_of_one_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to split"):
        split_file(rows_file(tmp_path / "one.json", *(("q", str(number)) for number in range(4))))


def test_a_part_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "r.json", ("a", "1"), ("b", "2"))
    (tmp_path / "r-test.json").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        split_file(path, to="xtuner")
    assert split_file(path).test.name == "r-test.jsonl"
    assert (tmp_path / "r-test.json").read_text() == "mine"


def test_a_question_is_compared_without_case_spaces_and_final_marks() -> None:
    assert (
        normal_question("What  IS\nthis? ") == normal_question("what\u00a0is this") == normal_question("What is this？")
    )
    assert normal_question("what is that") != normal_question("what is this")


def test_the_order_of_groups_is_pinned_and_a_new_one_leaves_it_as_it_was() -> None:
    names = dict.fromkeys(["aspirin", "ibuprofen", "insulin", "糖尿病", "paracetamol"], 1)
    assert hash_order(names, seed=0) == ["ibuprofen", "paracetamol", "aspirin", "糖尿病", "insulin"]
    assert hash_order(names, seed=1) != hash_order(names, seed=0)
    more = hash_order({"statin": 1, **names}, seed=0)
    assert [name for name in more if name != "statin"] == hash_order(names, seed=0)


def test_the_share_counts_rows_and_groups_stay_whole() -> None:
    sizes = {f"q{number}": 1 + number % 4 for number in range(100)}
    chosen = choose_test(sizes, test=0.3, seed=3)
    assert abs(sum(sizes[name] for name in chosen) - 0.3 * sum(sizes.values())) <= 2
    assert choose_test({"large": 99, "small": 1}, test=0.3, seed=0), "at least one group"


def test_repeats_are_kept_together_or_the_longest_answer_is_kept(tmp_path: Path) -> None:
    pairs = [
        ("What colour?", "PINK"),
        *((f"q{n}", f"a{n}") for n in range(8)),
        ("what  colour", "WHITE or pink"),
        ("q1", "b1"),
    ]
    path = rows_file(tmp_path / "r.json", *pairs)
    kept = split_file(path)
    assert (kept.groups, kept.repeated, kept.train_rows + kept.test_rows) == (9, [10, 11], 11)
    parts = [{normal_question(asked) for asked in questions(part)} for part in (kept.train, kept.test)]
    assert not parts[0] & parts[1]
    kept.train.unlink()
    kept.test.unlink()
    one = split_file(path, repeats="longest")
    assert (one.groups, one.repeated, one.train_rows + one.test_rows) == (9, [10, 11], 9)
    assert list(one.report.dropped.values()) == [[1, 11]], "the shorter answer, and of equals the later"
    assert (one.report.read, one.report.kept) == (11, 9)


def test_a_field_of_the_row_can_group(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{n}", "output": "a", "topic": f"T{n % 5}"} for n in range(40)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    split = split_file(tmp_path / "r.jsonl", group_by="topic")
    sides = [{int(asked[1:]) % 5 for asked in questions(part)} for part in (split.train, split.test)]
    assert split.groups == 5
    assert not sides[0] & sides[1]


def test_the_xtuner_parts_are_arrays_of_the_same_rows(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "r.json", *((f"q{n}", f"a{n}") for n in range(10)))
    lines, arrays = split_file(path, system="Be brief."), split_file(path, to="xtuner", system="Be brief.")
    for part, array in ((lines.train, arrays.train), (lines.test, arrays.test)):
        rows = [json.loads(line)["messages"] for line in part.read_text().splitlines()]
        turns = [{"system": s["content"], "input": u["content"], "output": a["content"]} for s, u, a in rows]
        assert json.loads(array.read_text()) == [{"conversation": [turn]} for turn in turns]


@pytest.mark.realdata
@pytest.mark.parametrize(("repeats", "train_rows", "test_rows"), [("keep", 474, 203), ("longest", 445, 190)])
def test_the_medication_sheet_splits_without_a_leak(
    real_data: Path, tmp_path: Path, repeats: str, train_rows: int, test_rows: int
) -> None:
    sheet = tmp_path / "medqa.xlsx"
    sheet.write_bytes((real_data / "MedInfo2019-QA-Medications.xlsx").read_bytes())
    rows = dict(iter_sheet_rows(sheet))
    split = split_file(sheet, test=0.3, seed=0, repeats=repeats)
    assert (split.train_rows, split.test_rows) == (train_rows, test_rows)
    assert split.report.read == len(rows) == 690
    non_answers = {row for why, rows in split.report.dropped.items() if why.startswith("no answer") for row in rows}
    assert non_answers == {number for number, row in rows.items() if row["URL"] == "n/a"}, (
        "by another column: it has no source"
    )
    assert len(non_answers) == 13
    kept = [row["Question"] for number, row in rows.items() if number not in non_answers]
    assert len(kept) - len({*kept}) == 39, "repeated word for word"
    assert len(split.repeated) == 42, "and three but for case or a question mark at the end"
    sides = [set(map(normal_question, questions(part))) for part in (split.train, split.test)]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == split.groups == 635


@pytest.mark.realdata
def test_the_medication_sheet_splits_the_same_way_again_and_otherwise_for_another_seed(
    real_data: Path, tmp_path: Path
) -> None:
    parts = []
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        sheet = tmp_path / f"{name}.xlsx"
        sheet.write_bytes((real_data / "MedInfo2019-QA-Medications.xlsx").read_bytes())
        split = split_file(sheet, seed=seed)
        parts.append((split.train.read_bytes(), split.test.read_bytes()))
    assert parts[0] == parts[1] != parts[2]
    ordered = "\n".join(questions(tmp_path / "first-test.jsonl"))
    assert hashlib.sha256(ordered.encode()).hexdigest()[:16] == "b7babdcc4e51d291", "the split of every machine"


@pytest.mark.realdata
@pytest.mark.parametrize("seed", range(3))
def test_held_out_rows_of_the_medication_sheet_share_no_question_with_the_others(real_data: Path, seed: int) -> None:
    path = str(real_data / "MedInfo2019-QA-Medications.xlsx")
    settings = DataSettings(path=path, format="medqa", on_bad_row="drop", held_out=100, seed=seed)
    held_out, _ = read_conversations(settings)
    everything, _ = read_conversations(settings.model_copy(update={"held_out": 0}))
    assert (len(held_out), len(everything)) == (100, 677)
    trained = {question_key(row) for row in everything if row not in held_out}
    assert trained.isdisjoint(map(question_key, held_out))
