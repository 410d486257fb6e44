from __future__ import annotations

import gzip
import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from course_lib.data.conversation import RowError
from course_lib.data.formats import iter_rows, read_rows, to_conversation
from course_lib.data.readers_sheet import iter_sheet_rows
from course_lib.errors import InputError

ROW = {"instruction": "Say hi", "output": "hi"}


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_json_array_in_a_jsonl_file_is_read_as_the_tutorial_writes_it(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path / "a.jsonl", json.dumps([ROW, ROW], indent=4))) == [ROW, ROW]


def test_json_lines_and_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path / "a.json", "\ufeff" + json.dumps(ROW) + "\n\n" + json.dumps(ROW) + "\n")) == [
        ROW,
        ROW,
    ]


def test_line_separators_inside_a_string_do_not_split_the_row(tmp_path: Path) -> None:
    row = {"instruction": "a\u2028b\x85c", "output": "d"}
    assert read_rows(written(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False))) == [row]


def test_one_object_over_several_lines(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path / "a.json", json.dumps(ROW, indent=2))) == [ROW]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        (" \n ", "is empty"),
        ("[]", "empty list"),
        ('[{"a": 1},\n {"b": }]', "line 2, column 8"),
        ('{"a": 1}\n{"b": 2\n', "line 2, column 8"),
        ("[" * 100_000, "nested too deeply"),
        ("caf\xe9".encode("latin-1"), "byte 0xE9 at line 1, column 4"),
        (b'{"a": 1}\n{"b": "\xff"}', "line 2, column 8"),
    ],
)
def test_files_that_cannot_be_read_say_where(tmp_path: Path, content: str | bytes, said: str) -> None:
    path = written(tmp_path / "rows.json", content)
    with pytest.raises(InputError, match=said) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_rows(tmp_path / "absent.json")
    with pytest.raises(InputError, match="is a folder"):
        read_rows(tmp_path)


def test_rows_come_one_by_one_and_the_bad_line_is_met_last(tmp_path: Path) -> None:
    for content in (json.dumps(ROW) + "\n{", f"[{json.dumps(ROW)},\n{{"):
        rows = iter_rows(written(tmp_path / "a.json", content))
        assert next(rows) == (1, ROW)
        with pytest.raises(InputError, match="line 2, column 2"):
            next(rows)


def test_json_lines_are_not_held_in_memory(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", (json.dumps({"text": "x" * 1000}) + "\n") * 10_000)
    tracemalloc.start()
    count = sum(1 for _ in iter_rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 10_000
    assert peak < 1_000_000


def test_gzip_is_read_whatever_the_suffix(tmp_path: Path) -> None:
    array = gzip.compress(json.dumps([ROW, ROW], indent=1).encode())
    lines = gzip.compress((json.dumps(ROW) + "\n" + json.dumps(ROW)).encode())
    assert read_rows(written(tmp_path / "a.json.gz", array)) == [ROW, ROW]
    assert read_rows(written(tmp_path / "a.jsonl", lines)) == [ROW, ROW]
    with pytest.raises(InputError, match="broken gzip"):
        read_rows(written(tmp_path / "a.json.gz", array[:-12]))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1, 2", "line 1, column 6: Expecting ',' delimiter"),
        ("[1,\n]", "line 2, column 1"),
        ("[1] 2", "line 1, column 5: Extra data"),
        ('\n\n{"a":\n\n1', "line 3, column 6"),
        ("[1,\n" + "9" * 5000 + "]", "starts at line 2"),
        ('{"a": 1}\n' + "[" * 100_000, "nested too deeply, in the value that starts at line 2"),
        (b"PAR1...", "is a Parquet file"),
        ("text".encode("utf-16"), "UTF-16"),
        (b"\xd0\xcf\x11\xe0...", "old Excel"),
        (b"PK\x03\x04...", "cannot be read as an Excel workbook"),
    ],
)
def test_more_files_that_cannot_be_read_say_where(tmp_path: Path, content: str | bytes, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        read_rows(written(tmp_path / "rows.json", content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("frame", ["{}", "[{}]"])
def test_a_key_that_stands_twice_is_noted_and_the_last_counts(tmp_path: Path, frame: str) -> None:
    noted: list[tuple[int, str]] = []
    path = written(tmp_path / "a.json", frame.replace("{}", '{"output": "a", "output": "b", "x": {"y": 1, "y": 2}}'))
    assert read_rows(path, note=lambda number, text: noted.append((number, text))) == [{"output": "b", "x": {"y": 2}}]
    ending = "stands twice in one object: the last one counts"
    assert noted == [(1, f"key 'y' {ending}"), (1, f"key 'output' {ending}")]


def test_numbers_json_allows_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"text": "a", "score": 1e400, "other": NaN}')
    assert to_conversation(read_rows(path)[0]) == {"text": "a"}


def sheet(path: Path, *sheets: tuple[str, list[list[Any]]]) -> Path:
    from openpyxl import Workbook

    workbook = Workbook()
    workbook.remove(workbook.active)
    for title, rows in sheets:
        page = workbook.create_sheet(title)
        for row in rows:
            page.append(row)
    workbook.save(path)
    return path


def test_a_sheet_is_read_by_its_header_with_its_own_row_numbers(tmp_path: Path) -> None:
    rows = [
        [],
        ["Focus", " ANSWER\u00a0", None, "question"],
        ["f", " a\u00a0b\n", "unnamed", "q1"],
        [],
        [None, 12, None, "q2"],
        [None, "\u00a0", None, "q3"],
        [None, "Unanswerable", None, "q4"],
    ]
    path = sheet(tmp_path / "a.xlsx", ("Notes", [["x"]]), ("Data", rows))
    read = list(iter_rows(path))
    assert read[:3] == [
        (3, {"Question": "q1", "Answer": "a b", "Focus": "f"}),
        (5, {"Question": "q2", "Answer": "12"}),
        (6, {"Question": "q3", "Answer": None}),
    ]
    assert to_conversation(read[0][1])["messages"][1] == {"role": "assistant", "content": "a b"}
    for (_, row), said in zip(read[2:], ("no 'Answer'", "no answer: 'Answer' is 'Unanswerable'"), strict=True):
        with pytest.raises(RowError, match=said):
            to_conversation(row)


def test_the_sheet_named_drugqa_comes_first(tmp_path: Path) -> None:
    columns = ["Question", "Answer"]
    path = sheet(tmp_path / "a.xlsx", ("Other", [columns, ["o", "o"]]), ("DrugQA", [columns, ["d", "d"]]))
    assert read_rows(path) == [{"Question": "d", "Answer": "d"}]


def test_sheets_that_do_not_fit_say_what_they_have(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no sheet has the columns Question and Answer: 'S' has Frage, Antwort"):
        read_rows(sheet(tmp_path / "a.xlsx", ("S", [["Frage", "Antwort"], ["q", "a"]])))
    with pytest.raises(InputError, match="more than one column Answer"):
        read_rows(sheet(tmp_path / "b.xlsx", ("S", [["Question", "Answer", "answer"], ["q", "a", "b"]])))
    with pytest.raises(InputError, match="has a header and no rows"):
        read_rows(sheet(tmp_path / "c.xlsx", ("S", [["Question", "Answer"]])))


def test_the_two_columns_may_have_other_names(tmp_path: Path) -> None:
    path = sheet(tmp_path / "a.xlsx", ("S", [["We reply", "No", " customer  ASKS"], ["a", 1, "q"]]))
    rows = list(iter_sheet_rows(path, columns=("Customer asks", "We reply")))
    assert rows == [(2, {"Question": "q", "Answer": "a", "No": "1"})]
    with pytest.raises(InputError, match="no sheet has the columns Ask and Reply: 'S' has We reply, No, customer ASKS"):
        list(iter_sheet_rows(path, columns=("Ask", "Reply")))


def test_without_openpyxl_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sheet(tmp_path / "a.xlsx", ("S", [["Question", "Answer"], ["q", "a"]]))
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(InputError, match="pip install openpyxl"):
        read_rows(path)
