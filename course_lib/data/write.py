"""Writing conversations: another form of the same file. `split.py` writes two parts of one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from course_lib.data.conversation import Conversation, RowError
from course_lib.data.formats import check_format_name, converted_rows, iter_rows
from course_lib.data.report import DataReport
from course_lib.data.system_prompts import system_prompt
from course_lib.errors import InputError, did_you_mean
from course_lib.files import atomic_file, file_to_write

OUTPUT_FORMS = ("messages", "xtuner")


def convert_file(
    source: str | Path, target: str | Path, *, row_format: str = "auto", to: str = "messages", system: str = ""
) -> DataReport:
    """Write every row that fits as JSON Lines of `messages`, or as XTuner's `conversation` in one JSON array.

    `system` is the system text of rows that have none of their own, or the name of one in `system_prompts.yaml`.

    Raises:
        InputError: the source cannot be read, the target exists, no row fits, or `system` is a word that names no text.
    """
    check_form(to)
    target = file_to_write(target, overwrite=False)
    report = DataReport()
    rows = (row for *_, row in rows_in_form(source, row_format, report, to, system_text(system)))
    write_rows(target, rows, as_array=to == "xtuner")
    if not report.kept:
        target.unlink()
        raise InputError(f"{source}: no row fits: {report.summary()}")
    return report


def check_form(to: str) -> None:
    """Check the name of an output form.

    Raises:
        InputError: it is none of `OUTPUT_FORMS`.
    """
    if to not in OUTPUT_FORMS:
        raise InputError(f"form {to!r} is unknown: choose {' or '.join(OUTPUT_FORMS)}{did_you_mean(to, OUTPUT_FORMS)}")


def system_text(system: str) -> str:
    """A system text as it is given: one small ASCII word is the name of a text, anything else is the text itself.

    Raises:
        InputError: a word that names no text of `system_prompts.yaml`.
    """
    return system_prompt(system) if re.fullmatch(r"[a-z_]+", system) else system


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


def rows_in_form(
    source: str | Path, row_format: str, report: DataReport, to: str = "messages", system: str = ""
) -> Iterator[tuple[int, Any, Conversation, Any]]:
    """(number, row of the file, conversation, row in the form) of every row that fits; the others are counted in the report."""
    check_format_name(row_format)
    rows = iter_rows(source, note=report.note)
    for number, raw, outcome, notes in converted_rows(rows, row_format=row_format):
        report.read += 1
        try:
            if isinstance(outcome, RowError):
                raise outcome
            conversation = with_system(outcome, system)
            row = conversation if to == "messages" else to_xtuner(conversation)
        except RowError as reason:
            report.drop(number, str(reason))
            continue
        for note in notes:
            report.note(number, note)
        report.kept += 1
        yield number, raw, conversation, row


def with_system(row: Conversation, system: str) -> Conversation:
    """The conversation with `system` before it; as it is where that is blank, or where it has a system text or is plain text."""
    messages = row.get("messages")
    if not system.strip() or not messages or messages[0]["role"] == "system":
        return row
    return {**row, "messages": [{"role": "system", "content": system}, *messages]}


def write_rows(path: Path, rows: Iterable[Any], *, as_array: bool) -> None:
    """Write rows to `path`, whole or not at all: JSON Lines, or one JSON array with a row a line."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        if as_array:
            file.write("[")
            for number, row in enumerate(rows):
                file.write((",\n" if number else "\n") + json.dumps(row, ensure_ascii=False))
            file.write("\n]\n")
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
