from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from course_lib.data import cache, dataset, formats
from course_lib.data.cache import content_key, map_rows, rows_from, tokenizer_key
from course_lib.data.dataset import load_dataset
from course_lib.data.templates import choose_template, named_template
from course_lib.errors import InputError
from course_lib.recipe import DataSettings


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"q{number}", "output": f"answer {tmp_path} {number}"} for number in range(10)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How many rows were read and tokenised, not taken from the cache."""
    counted = {"read": 0, "tokenised": 0}
    to_conversation, encode = formats.to_conversation, dataset.encode_conversations

    def reading(*arguments: Any, **named: Any) -> Any:
        counted["read"] += 1
        return to_conversation(*arguments, **named)

    def encoding(rows: Any, *arguments: Any, **named: Any) -> Any:
        counted["tokenised"] += len(rows)
        return encode(rows, *arguments, **named)

    monkeypatch.setattr(formats, "to_conversation", reading)
    monkeypatch.setattr(dataset, "encode_conversations", encoding)
    return counted


def load(tokenizer: Any, path: Path, template: str = "auto", **settings: Any) -> Any:
    chosen = choose_template(tokenizer) if template == "auto" else named_template(template)
    return load_dataset(DataSettings(path=str(path), **settings), template=chosen, tokenizer=tokenizer)


def test_the_same_content_is_read_and_tokenised_once(tokenizer: Any, rows_file: Path, count: dict[str, int]) -> None:
    first = load(tokenizer, rows_file)
    assert count == {"read": 10, "tokenised": 10}
    os.utime(rows_file, (time.time() + 100, time.time() + 100))  # touched, not changed
    moved = rows_file.rename(rows_file.with_name("moved.jsonl"))
    again = load(tokenizer, moved)
    assert count == {"read": 10, "tokenised": 10}
    assert list(first.train) == list(again.train)
    assert first.report == again.report


def test_what_changes_the_tokens_makes_them_anew(tokenizer: Any, rows_file: Path, count: dict[str, int]) -> None:
    load(tokenizer, rows_file)
    for number, settings in enumerate([{"max_length": 100}, {"train_on": "last"}, {"template": "vicuna"}], start=2):
        load(tokenizer, rows_file, **settings)
        assert count == {"read": 10, "tokenised": 10 * number}, settings
    rows_file.write_text(rows_file.read_text().replace("q7", "Q7"))
    changed = load(tokenizer, rows_file)
    assert count == {"read": 20, "tokenised": 50}
    assert "Q7" in tokenizer.decode(changed.train[7].input_ids)


def test_another_tokenizer_has_another_key(tiny: Path) -> None:
    one, same, other = (AutoTokenizer.from_pretrained(tiny) for _ in range(3))
    other.add_tokens(["<extra>"])
    assert tokenizer_key(one) == tokenizer_key(same) != tokenizer_key(other)


def test_a_row_refused_is_refused_again_from_the_cache(tokenizer: Any, rows_file: Path) -> None:
    rows_file.write_text(rows_file.read_text() + '\n{"instruction": "x"}')
    for _ in range(2):
        with pytest.raises(InputError, match=r"rows\.jsonl: row 11: row has no 'output'"):
            load(tokenizer, rows_file)
    kept = load(tokenizer, rows_file, on_bad_row="drop")
    assert (kept.report.read, kept.report.kept) == (11, 10)
    with pytest.raises(InputError, match=r"rows\.jsonl: row 11: row has no 'output'"):  # the table stands by now
        load(tokenizer, rows_file)


def test_several_processes_give_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    table = rows_from(lambda: ({"n": n} for n in range(100)), {"n": "int64"}, content_key("processes"))
    monkeypatch.setattr(cache, "ROWS_A_PROCESS", 20)
    doubled = map_rows(table, double, {"n": "int64", "process": "int64"}, content_key("doubled"), by=2)
    assert doubled["n"][:] == [2 * n for n in range(100)]
    if (os.cpu_count() or 1) > 1:
        assert len({*doubled["process"][:]} - {os.getpid()}) > 1


def double(batch: dict[str, list[int]], *, by: int) -> dict[str, list[int]]:
    return {"n": [by * n for n in batch["n"]], "process": [os.getpid()] * len(batch["n"])}


def test_half_a_table_is_never_kept() -> None:
    def broken() -> Iterator[dict[str, int]]:
        yield {"n": 1}
        raise InputError("row 2: broken")

    key = content_key("half")
    with pytest.raises(InputError, match="row 2: broken"):
        rows_from(broken, {"n": "int64"}, key)
    assert rows_from(lambda: ({"n": n} for n in range(3)), {"n": "int64"}, key)["n"][:] == [0, 1, 2]


def test_a_row_with_half_a_surrogate_pair_is_named(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "\\ud800", "output": "b", "\\ud800": 1}')
    report = load(tokenizer, path, on_bad_row="drop").report
    assert (report.read, report.kept) == (2, 1)
    assert "row 2" in report.summary()
