from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from course_lib.data.dataset import load_dataset
from course_lib.data.identity import LANGUAGES, identity_conversations
from course_lib.data.sources import locate
from course_lib.data.templates import choose_template
from course_lib.errors import CourseError, InputError
from course_lib.recipe import DataSettings


def load(tokenizer: Any, **settings: Any) -> Any:
    return load_dataset(DataSettings(**settings), template=choose_template(tokenizer), tokenizer=tokenizer)


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"q{number}", "output": f"answer {number}"} for number in range(10)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_every_row_is_accounted_for(tokenizer: Any, rows_file: Path) -> None:
    rows_file.write_text(
        rows_file.read_text()
        + '\n{"instruction": "x", "output": ""}\n{"instruction": "'
        + "long " * 60
        + '", "output": "y"}'
    )
    dataset = load(tokenizer, path=str(rows_file), on_bad_row="drop", max_length=150)
    report = dataset.report
    assert (report.read, report.kept, sum(map(len, report.dropped.values()))) == (12, 10, 2)
    assert "no output" in report.summary()
    assert "row 11" in report.summary()
    assert "nothing left to train within max_length 150: row 12" in report.summary()


def test_a_bad_row_is_named_by_file_row_and_reason(tokenizer: Any, rows_file: Path) -> None:
    rows_file.write_text(rows_file.read_text() + '\n{"instruction": "x"}')
    with pytest.raises(InputError, match=r"rows\.jsonl: row 11: row has no 'output'.*on_bad_row=drop"):
        load(tokenizer, path=str(rows_file))


def test_truncation_cuts_from_the_right_and_is_counted(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    path.write_text(json.dumps([{"instruction": "q", "output": "word " * 100}]))
    dataset = load(tokenizer, path=str(path), max_length=150)
    assert dataset.report.truncated == 1
    assert len(dataset.train[0].input_ids) == 150
    assert dataset.train[0].trained_tokens > 0


def test_held_out_rows_are_chosen_by_the_seed_and_not_trained_on(tokenizer: Any, rows_file: Path) -> None:
    first, again, other = (load(tokenizer, path=str(rows_file), held_out=3, seed=seed) for seed in (1, 1, 2))
    assert first.held_out == again.held_out != other.held_out
    assert len(first.held_out) == 3
    assert len(first.train) == 7
    assert not {tuple(example.input_ids) for example in first.held_out} & {
        tuple(example.input_ids) for example in first.train
    }


def test_nothing_left_to_train_on(tokenizer: Any, rows_file: Path) -> None:
    with pytest.raises(InputError, match="no row is left to train on: 10 rows read"):
        load(tokenizer, path=str(rows_file), max_length=8)


def test_identity_rows_differ_and_carry_the_name() -> None:
    rows = identity_conversations(name="Grace", base="B", n=80)
    texts = {json.dumps(row) for row in rows}
    assert len(texts) == 80
    assert all("Grace" in row["messages"][1]["content"] for row in rows)
    assert rows == identity_conversations(name="Grace", base="B", n=80)
    assert rows != identity_conversations(name="Grace", base="B", n=80, seed=1)


def test_dilution_adds_its_share_of_general_chat() -> None:
    rows = identity_conversations(name="Grace", base="B", n=30, dilute=0.5)
    assert len(rows) == 60
    assert sum("Grace" in row["messages"][1]["content"] for row in rows) == 30


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": " "}, "cannot be used"),
        ({"name": "a\nb"}, "cannot be used"),
        ({"name": "<|im_end|>"}, "cannot be used"),
        ({"languages": ["de"]}, "language 'de' is unknown"),
        ({"languages": []}, "no language"),
        ({"n": 100_000}, "from 1 to 128"),
        ({"dilute": 1.0}, "dilute is 1.0"),
        ({"n": 128, "dilute": 0.9}, "1152 general rows"),
    ],
)
def test_identity_refuses_what_it_cannot_make(arguments: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        identity_conversations(**{"name": "A", "base": "B", "languages": LANGUAGES, **arguments})


def test_hub_address_must_name_a_file() -> None:
    with pytest.raises(InputError, match="hf://datasets/OWNER/NAME/FILE"):
        locate("hf://datasets/owner/name")


def test_hub_file_without_network_says_what_to_do() -> None:
    with pytest.raises(CourseError, match="could not be fetched.*HF_ENDPOINT"):
        locate("hf://datasets/owner/name/file.json")
