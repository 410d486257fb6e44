"""Writing conversations: another form of the same file, and a split into training and test rows."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course_lib.data.conversation import Conversation, RowError
from course_lib.data.formats import check_format_name, converted_rows, iter_rows
from course_lib.data.report import DataReport
from course_lib.errors import InputError, did_you_mean
from course_lib.files import atomic_file, file_to_write

OUTPUT_FORMS = ("messages", "xtuner")


def convert_file(
    source: str | Path, target: str | Path, *, row_format: str = "auto", to: str = "messages"
) -> DataReport:
    """Write every row that fits as JSON Lines of `messages`, or as XTuner's `conversation` in one JSON array.

    Raises:
        InputError: the source cannot be read, the target exists, or no row fits.
    """
    if to not in OUTPUT_FORMS:
        raise InputError(f"form {to!r} is unknown: choose {' or '.join(OUTPUT_FORMS)}{did_you_mean(to, OUTPUT_FORMS)}")
    target = file_to_write(target, overwrite=False)
    report = DataReport()
    rows = (row for _, row in _rows_in_form(source, row_format, report, to))
    _write_rows(target, rows, as_array=to == "xtuner")
    if not report.kept:
        target.unlink()
        raise InputError(f"{source}: no row fits: {report.summary()}")
    return report


def to_xtuner(row: Conversation) -> dict[str, Any]:
    """The XTuner 0.1.9 form of a conversation: turns of input and output, the system text in the first.

    Raises:
        RowError: the form has no place for it: tools, plain text, two answers in a row, a question nobody answered.
    """
    messages = row.get("messages")
    if messages is None or row.get("tools") or any(m["role"] == "tool" or m.get("tool_calls") for m in messages):
        raise RowError("XTuner's conversation form has no place for tools or plain text")
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if len(turns) % 2 or any(m["role"] != ("user", "assistant")[index % 2] for index, m in enumerate(turns)):
        raise RowError("XTuner's conversation form needs a question before every answer, and an answer after it")
    pairs: list[dict[str, Any]] = [
        {"input": question["content"], "output": answer["content"]}
        for question, answer in zip(turns[::2], turns[1::2], strict=True)
    ]
    if system:
        pairs[0] = {"system": system, **pairs[0]}
    return {"conversation": pairs}


@dataclass(frozen=True)
class Split:
    """Where the two parts stand and how many rows each has; `groups` counts what was kept together."""

    train: Path
    test: Path
    train_rows: int
    test_rows: int
    groups: int
    report: DataReport


def split_file(
    source: str | Path, *, test: float = 0.3, group_by: str = "question", seed: int = 0, row_format: str = "auto"
) -> Split:
    """Write `NAME-train.jsonl` and `NAME-test.jsonl` beside the source, in the `messages` form.

    Args:
        test: share of rows in the test part. Groups stay whole, so the share is met as nearly as the groups allow.
        group_by: rows that share it stand on one side. `question` is the first user turn, in lower case, without
            punctuation at its end and with single spaces; any other name is a field of the row as it stands in the file.
        seed: fixes the choice, the same on every machine.

    Raises:
        InputError: a share that is not between 0 and 1, a field no row has, fewer than two groups, or a part that exists.
    """
    if not 0 < test < 1:
        raise InputError(f"test share is {test}: give a number between 0 and 1, such as 0.3")
    source = Path(source)
    stem = source.name.split(".")[0]
    paths = {
        side: file_to_write(source.with_name(f"{stem}-{side}.jsonl"), overwrite=False) for side in ("train", "test")
    }
    report = DataReport()
    key_of = _question_key if group_by == "question" else _field_key(group_by)
    groups: dict[str, list[Conversation]] = defaultdict(list)
    for raw, row in _rows_in_form(source, row_format, report):
        groups[key_of(raw, row)].append(row)
    if len(groups) < 2:
        raise InputError(
            f"{source}: {len(groups)} group of rows by {group_by!r}, so there is nothing to split: {report.summary()}"
        )
    names = sorted(groups)
    random.Random(seed).shuffle(names)
    wanted = round(test * report.kept)
    parts: dict[str, list[Conversation]] = {"train": [], "test": []}
    for name in names:  # a group goes to the test part while that brings its size nearer to what is wanted
        size = len(groups[name])
        nearer = abs(len(parts["test"]) + size - wanted) < abs(len(parts["test"]) - wanted)
        parts["test" if nearer or not parts["test"] else "train"].extend(groups[name])
    if not parts["train"]:
        raise InputError(f"{source}: a test share of {test} leaves no group for training")
    for side, rows in parts.items():
        _write_rows(paths[side], rows, as_array=False)
    return Split(paths["train"], paths["test"], len(parts["train"]), len(parts["test"]), len(groups), report)


def normal_question(text: str) -> str:
    """A question as it is compared: lower case, single spaces, no punctuation at its end."""
    return " ".join(text.casefold().split()).rstrip("?!.。？！ ")


def _question_key(raw: Any, row: Conversation) -> str:
    asked = (message["content"] for message in row.get("messages", []) if message["role"] == "user")
    return normal_question(next(asked, row.get("text", "")))


def _field_key(name: str) -> Callable[[Any, Conversation], str]:
    def key(raw: Any, row: Conversation) -> str:
        if name not in raw:
            raise InputError(
                f"group-by {name!r}: a row has no such field (it has {', '.join(map(str, raw))}){did_you_mean(name, map(str, raw))}"
            )
        value = raw[name]
        return normal_question(value) if isinstance(value, str) else json.dumps(value, sort_keys=True)

    return key


def _rows_in_form(
    source: str | Path, row_format: str, report: DataReport, to: str = "messages"
) -> Iterator[tuple[Any, Any]]:
    """(row as it stands in the file, row in the form) of every row that fits; the others are counted in the report."""
    check_format_name(row_format)
    rows = iter_rows(source, note=report.note)
    for number, raw, outcome, notes in converted_rows(rows, row_format=row_format):
        report.read += 1
        try:
            if isinstance(outcome, RowError):
                raise outcome
            row = outcome if to == "messages" else to_xtuner(outcome)
        except RowError as reason:
            report.drop(number, str(reason))
            continue
        for note in notes:
            report.note(number, note)
        report.kept += 1
        yield raw, row


def _write_rows(path: Path, rows: Iterable[Any], *, as_array: bool) -> None:
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        if as_array:
            file.write("[")
            for number, row in enumerate(rows):
                file.write((",\n" if number else "\n") + json.dumps(row, ensure_ascii=False))
            file.write("\n]\n")
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
