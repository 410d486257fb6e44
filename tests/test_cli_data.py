"""`course data …`, in process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROWS = [
    {"instruction": f"Question {number}?", "output": f"This is answer {number}, in a few words."}
    for number in range(10)
] + [
    {"instruction": "question 3 ", "output": "The same question with another answer."},
    {"instruction": "Bad row"},
]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    return path


def test_check_accounts_for_every_row(course: Callable, rows_file: Path) -> None:
    result = course("data", "check", str(rows_file), "--json", "--model", "tiny")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["rows"], report["kept"], report["format"]) == (12, 11, "alpaca")
    assert report["dropped"] == {"row has no 'output'": 1}
    assert report["dropped_rows"] == {"row has no 'output'": [12]}
    assert report["languages"]["en"] >= 9
    assert sum(report["tokens"]["histogram"].values()) == 11
    assert 0 < report["tokens"]["trained_share"] < 1
    table = course("data", "check", str(rows_file), "--model", "tiny").stdout
    assert "row has no 'output'" in table
    assert "12" in table


def test_check_sees_duplicates(course: Callable, tmp_path: Path) -> None:
    words = " ".join(f"word{number}" for number in range(60))
    rows = [
        {"instruction": "a", "output": words},
        {"instruction": "A ", "output": words},
        {"instruction": "a", "output": words + " more"},
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = json.loads(course("data", "check", "d.jsonl", "--json").stdout)
    assert (report["duplicates"], report["near_duplicates"]) == (1, 1)


def test_preview_shows_ids_labels_and_packs(course: Callable, rows_file: Path, tmp_path: Path) -> None:
    rows_file.write_text(json.dumps(ROWS[:10]))
    (tmp_path / "r.yaml").write_text(f"model: {{name: tiny}}\ndata: {{path: {rows_file}, max_length: 1024}}\n")
    rows = [json.loads(line) for line in course("data", "preview", "r.yaml", "-n", "2", "--json").stdout.splitlines()]
    assert len(rows) == 2
    assert all(
        {"text", "input_ids", "labels"} == row.keys() and len(row["input_ids"]) == len(row["labels"]) for row in rows
    )
    packs = [
        json.loads(line)
        for line in course("data", "preview", "r.yaml", "-n", "1", "--packed", "--json").stdout.splitlines()
    ]
    assert packs[0]["cu_seqlens"][-1] == len(packs[0]["position_ids"]) == len(packs[0]["input_ids"])
    assert packs[0]["position_ids"].count(0) == len(packs[0]["cu_seqlens"]) - 1 > 1
    assert "answer" in course("data", "preview", "r.yaml", "-n", "1").stdout


def test_convert_to_messages_and_back_to_xtuner(course: Callable, rows_file: Path, tmp_path: Path) -> None:
    assert course("data", "convert", str(rows_file), "m.jsonl").returncode == 0
    messages = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert len(messages) == 11
    assert messages[0]["messages"][0] == {"role": "user", "content": "Question 0?"}
    assert course("data", "convert", "m.jsonl", "x.jsonl", "--to", "xtuner").returncode == 0
    turns = json.loads((tmp_path / "x.jsonl").read_text())
    assert turns[0] == {"conversation": [{"input": "Question 0?", "output": ROWS[0]["output"]}]}
    before = (tmp_path / "x.jsonl").read_bytes()
    refused = course("data", "convert", "m.jsonl", "x.jsonl")
    assert refused.returncode == 2
    assert "already exists" in refused.stderr
    assert (tmp_path / "x.jsonl").read_bytes() == before


def first_questions(path: Path) -> set[str]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["messages"][0]["content"].strip().casefold().rstrip("?") for row in rows}


def test_split_keeps_a_question_on_one_side_and_repeats_with_its_seed(
    course: Callable, rows_file: Path, tmp_path: Path
) -> None:
    first = json.loads(course("data", "split", str(rows_file), "--seed", "5", "--json").stdout)
    assert first["train_rows"] + first["test_rows"] == 11
    assert 3 <= first["test_rows"] <= 4
    parts = [Path(first["train"]), Path(first["test"])]
    assert not first_questions(parts[0]) & first_questions(parts[1])
    texts = [part.read_text() for part in parts]
    assert course("data", "split", str(rows_file)).returncode == 2, "parts that exist are not overwritten"
    for part in parts:
        part.unlink()
    course("data", "split", str(rows_file), "--seed", "5")
    assert [part.read_text() for part in parts] == texts


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "absent.json"], "no such file"),
        (["check", "rows.json", "--format", "alpacca"], "did you mean alpaca"),
        (["check", "rows.json", "--model", "tinny"], "did you mean tiny"),
        (["convert", "rows.json", "o.jsonl", "--to", "xtunr"], "did you mean xtuner"),
        (["split", "rows.json", "--test", "1.5"], "test share is 1.5"),
        (["split", "rows.json", "--group-by", "topic"], "no such field"),
        (["preview", "absent_recipe"], "recipe 'absent_recipe' is unknown"),
    ],
)
def test_bad_input(course: Callable, rows_file: Path, arguments: list[str], said: str) -> None:
    result: Any = course("data", *arguments)
    assert result.returncode == 2, result.stderr
    assert said in result.stderr
    assert result.stderr.count("course:") == 1
    assert result.stdout == ""


@pytest.mark.realdata
@pytest.mark.embedded
@pytest.mark.parametrize(
    ("file", "rows", "kept", "row_format"),
    [
        ("openassistant_guanaco_1k.jsonl", 1000, 1000, "guanaco"),
        ("alpaca_en_demo.json", 999, 999, "alpaca"),
        ("glaive_toolcall_en_demo.json", 300, 300, "sharegpt"),
        ("MedInfo2019-QA-Medications.xlsx", 690, 677, "medqa"),
    ],
)
def test_real_files_are_accounted_for(
    course: Callable, embedded: Path, real_data: Path, file: str, rows: int, kept: int, row_format: str
) -> None:
    result = course("data", "check", str(real_data / file), "--json", "--model", "smollm2-135m-instruct")
    report = json.loads(result.stdout)
    assert (report["rows"], report["kept"], report["format"]) == (rows, kept, row_format)
    assert report["kept"] + sum(report["dropped"].values()) == rows
    if row_format == "guanaco":
        assert report["multi_turn_rows"] == 353


def test_a_preview_without_colours_still_tells_what_is_trained(course: Callable, tmp_path: Path) -> None:
    rows = [
        [{"role": "user", "content": f"say <|im_end|> {n}"}, {"role": "assistant", "content": f"a{n}"}]
        for n in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    settings = ("--set", "data.path=rows.jsonl", "--set", "data.format=auto", "--set", "data.held_out=0")
    recipe = ("smollm2_135m_lora_alpaca_512_e1", "--set", "model.name=tiny", *settings)
    shown = course("data", "preview", *recipe, "-n", "1").stdout
    assert "say <|im_end|> 0◆<|im_end|>" in shown  # what the user typed is text, the end of the turn a token
    assert "⟦a0◆<|im_end|>⟧" in shown
    packs = course("data", "preview", *recipe, "--packed", "-n", "1").stdout
    assert packs.count("┆ sample ") > 1
    cut = course(
        "data", "preview", *recipe, "--packed", "--set", "data.packing=concat", "--set", "data.max_length=200"
    ).stdout
    assert "tokens 1 to " in cut


def test_check_fails_where_no_row_fits(course: Callable, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"instruction": 3, "output": "a"}]')
    result = course("data", "check", "rows.json")
    assert result.returncode == 2
    assert "no row fits" in result.stderr
    assert "'instruction' is a number" in result.stdout
    as_json = course("data", "check", "rows.json", "--json")
    assert (as_json.returncode, json.loads(as_json.stdout)["kept"]) == (2, 0)


def test_check_says_how_many_rows_were_measured(course: Callable, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": turns}, {"messages": turns, "tools": [tool]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "of 1 of 2 rows" in course("data", "check", "rows.jsonl", "--model", "tiny").stdout
    (tmp_path / "tools.jsonl").write_text(json.dumps(rows[1]))
    assert "can write no row" in course("data", "check", "tools.jsonl", "--model", "tiny").stdout
    measured = course("data", "check", "tools.jsonl", "--model", "tiny", "--template", "qwen_chat", "--json")
    assert json.loads(measured.stdout)["tokens"]["rows"] == 1
