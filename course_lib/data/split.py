"""A split into training and test rows with no question on both sides, the same for the same seed on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from course_lib.data.conversation import Conversation
from course_lib.data.report import DataReport
from course_lib.data.write import check_form, rows_in_form, system_text, write_rows
from course_lib.errors import InputError, did_you_mean
from course_lib.files import file_to_write

REPEATS = ("keep", "longest")
Group = TypeVar("Group")


@dataclass(frozen=True)
class Split:
    """Where the two parts stand, and what went into them.

    Attributes:
        groups: how many different questions there are; rows of one question stand on one side.
        repeated: the numbers of the rows whose question an earlier row had asked.
        report: what became of every row of the source.
    """

    train: Path
    test: Path
    train_rows: int
    test_rows: int
    groups: int
    repeated: list[int]
    report: DataReport


@dataclass(frozen=True)
class _Row:
    number: int
    written: Any  # in the output form
    answer_length: int  # characters of all assistant turns


def split_file(
    source: str | Path,
    *,
    test: float = 0.3,
    group_by: str = "question",
    repeats: str = "keep",
    seed: int = 0,
    row_format: str = "auto",
    to: str = "messages",
    system: str = "",
) -> Split:
    """Write `NAME-train` and `NAME-test` beside the source: `.jsonl` in the `messages` form, or `.json`, XTuner's array.

    Args:
        test: share of rows in the test part. Groups stay whole, so the share is met as nearly as the groups allow.
        group_by: rows that share it stand on one side. `question` is the first user turn, in lower case, without
            punctuation at its end and with single spaces; any other name is a field of the row as it stands in the file.
        repeats: rows of one group with several answers: `keep` them all, or only the `longest` answer (of equals, the
            first); the others are then dropped, and counted in the report.
        seed: fixes the choice. Groups are taken in the order of a hash of seed and question, not of a random generator
            whose algorithm a version of Python could change; and a row more leaves the order of the others as it was.
        to: `messages` or `xtuner`.
        system: system text of rows that have none of their own, or the name of one in `system_prompts.yaml`.

    Raises:
        InputError: a share that is not between 0 and 1, an unknown choice, a field no row has, fewer than two groups, or a
            part that exists.
    """
    if not 0 < test < 1:
        raise InputError(f"test share is {test}: give a number between 0 and 1, such as 0.3")
    if repeats not in REPEATS:
        raise InputError(
            f"repeats {repeats!r} is unknown: choose {' or '.join(REPEATS)}{did_you_mean(repeats, REPEATS)}"
        )
    check_form(to)
    source = Path(source)
    stem, suffix = source.name.split(".")[0], ".jsonl" if to == "messages" else ".json"
    paths = {
        side: file_to_write(source.with_name(f"{stem}-{side}{suffix}"), overwrite=False) for side in ("train", "test")
    }
    report = DataReport()
    groups = _grouped(group_by, rows_in_form(source, row_format, report, to, system_text(system)))
    repeated = sorted(row.number for group in groups.values() for row in group[1:])
    if repeats == "longest":
        groups = _one_answer_each(groups, report)
    if len(groups) < 2:
        raise InputError(
            f"{source}: {len(groups)} group of rows by {group_by!r}, so there is nothing to split: {report.summary()}"
        )
    in_test = choose_test({name: len(group) for name, group in groups.items()}, test=test, seed=seed)
    if len(in_test) == len(groups):
        raise InputError(f"{source}: a test share of {test} leaves no group for training")
    parts: dict[str, list[Any]] = {"train": [], "test": []}
    for name in hash_order(groups, seed=seed):
        parts["test" if name in in_test else "train"] += (row.written for row in groups[name])
    for side, rows in parts.items():
        write_rows(paths[side], rows, as_array=to == "xtuner")
    return Split(paths["train"], paths["test"], len(parts["train"]), len(parts["test"]), len(groups), repeated, report)


def choose_test(sizes: Mapping[str, int], *, test: float, seed: int) -> set[str]:
    """Choose the groups of the test part: whole ones, in hash order, each that brings its rows nearer to the share.

    Args:
        sizes: rows of each group, by its name.
        test: the share of all rows that is wanted, between 0 and 1. At least one group is chosen.
    """
    wanted = round(test * sum(sizes.values()))
    return set(whole_groups(hash_order(sizes, seed=seed), sizes, wanted=wanted))


def whole_groups(order: Iterable[Group], sizes: Mapping[Group, int], *, wanted: int) -> list[Group]:
    """Take groups in an order, each that brings the number of rows nearer to the one wanted; the first in any case."""
    chosen: list[Group] = []
    rows = 0
    for name in order:
        if not chosen or abs(rows + sizes[name] - wanted) < abs(rows - wanted):
            chosen.append(name)
            rows += sizes[name]
    return chosen


def hash_order(names: Mapping[str, Any], *, seed: int) -> list[str]:
    """Names in the order of the SHA-256 of `SEED`, a line feed and the name: fixed for all machines and versions."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}\n{name}".encode(errors="surrogatepass")).digest())


def normal_question(text: str) -> str:
    """A question as it is compared: lower case, single spaces, no punctuation at its end."""
    return " ".join(text.casefold().split()).rstrip("?!.。？！ ")


def question_key(row: Conversation) -> str:
    """What rows of one question have in common: the normal form of the first user turn, or of all text where there is none."""
    messages = row.get("messages", [])
    asked = (message["content"] for message in messages if message["role"] == "user")
    return normal_question(next(asked, row.get("text", "\n".join(message["content"] for message in messages))))


def _grouped(group_by: str, rows: Iterable[tuple[int, Any, Conversation, Any]]) -> dict[str, list[_Row]]:
    key_of = _field_key(group_by) if group_by != "question" else lambda raw, conversation: question_key(conversation)
    groups: dict[str, list[_Row]] = {}
    for number, raw, conversation, written in rows:
        groups.setdefault(key_of(raw, conversation), []).append(_Row(number, written, _answer_length(conversation)))
    return groups


def _one_answer_each(groups: dict[str, list[_Row]], report: DataReport) -> dict[str, list[_Row]]:
    best = {name: max(group, key=lambda row: row.answer_length) for name, group in groups.items()}
    left_out = sorted(row.number for name, group in groups.items() for row in group if row is not best[name])
    for number in left_out:
        report.drop(number, "another row answers the same question at greater length, or came first")
    report.kept -= len(left_out)
    return {name: [row] for name, row in best.items()}


def _answer_length(row: Conversation) -> int:
    return sum(len(message["content"]) for message in row.get("messages", []) if message["role"] == "assistant")


def _field_key(name: str) -> Callable[[Any, Conversation], str]:
    def key(raw: Any, row: Conversation) -> str:
        if name not in raw:
            raise InputError(
                f"group-by {name!r}: a row has no such field (it has {', '.join(map(str, raw))}){did_you_mean(name, map(str, raw))}"
            )
        value = raw[name]
        return normal_question(value) if isinstance(value, str) else json.dumps(value, sort_keys=True)

    return key
