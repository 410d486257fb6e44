"""A recipe's rows as tokenised examples on disk, with every row accounted for.

File → conversations → examples: two tables, each made once for the same content and kept in the cache (data/cache.py). Rows
go through in batches, so memory stays flat however many there are.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from course_lib.agent.protocol import choose_protocol
from course_lib.data.cache import content_key, map_rows, rows_from, tokenizer_key
from course_lib.data.conversation import Conversation, RowError
from course_lib.data.examples import Examples
from course_lib.data.formats import check_format_name, converted_rows, iter_rows
from course_lib.data.identity import identity_conversations
from course_lib.data.report import DataReport
from course_lib.data.sources import locate
from course_lib.data.split import question_key, whole_groups
from course_lib.data.tokenize import Example, TrainOn, encode_conversations
from course_lib.errors import InputError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from course_lib.agent.protocol import AgentProtocol
    from course_lib.data.templates import ChatTemplate
    from course_lib.recipe import DataSettings

OverLong = Literal["truncate", "split", "drop"]

LARGE_FILE = 20_000_000  # bytes from which reading shows a progress bar

# One row of a file: its conversation as JSON, or why it has none. Only notes where a note belongs to no row that came out.
_ROW_COLUMNS = {"row": "int64", "conversation": "string", "dropped": "string", "notes": ["string"]}
# One example, with what became of its row: kept, truncated, or split (the first part) or part (the others); or no example
# and why.
_EXAMPLE_COLUMNS = {"row": "int64", "input_ids": ["int32"], "labels": ["int32"], "outcome": "string"}
_KEPT, _TRUNCATED, _SPLIT, _PART = "kept", "truncated", "split", "part"


@dataclass(frozen=True)
class Dataset:
    """Examples to train on, examples held out, and the account of the rows they came from."""

    train: Examples
    held_out: Examples
    report: DataReport


def load_dataset(settings: DataSettings, *, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Read, tokenise and split a recipe's data: `held_out` rows are chosen by the seed, and their questions are never trained on.

    Raises:
        InputError: a row does not fit and `on_bad_row` is "error" (the message names file, row and reason), or nothing
            is left to train on.
    """
    report = DataReport()
    conversations, key = load_conversations(settings, report=report)
    rules = {"max_length": settings.max_length, "over_long": settings.over_long, "train_on": settings.train_on}
    table = map_rows(
        conversations,
        _encode_batch,
        _EXAMPLE_COLUMNS,
        content_key(key, repr(template), tokenizer_key(tokenizer), repr(rules), settings.protocol),
        protocol=choose_protocol(settings.protocol, template, tokenizer),
        template=template,
        tokenizer=tokenizer,
        **rules,
    )
    examples, rows = _account_for_examples(table, report)
    held_out = np.isin(rows, _held_out_rows(conversations, settings))
    if held_out.all():
        raise InputError(f"{settings.path or 'the identity data'}: no row is left to train on: {report.summary()}")
    return Dataset(examples.where(~held_out), examples.where(held_out), report)


def load_conversations(settings: DataSettings, *, report: DataReport) -> tuple[datasets.Dataset, str]:
    """Read the rows a recipe names; the report counts them, and those that do not fit.

    Returns:
        A table with columns `row`, its number, and `conversation`, as JSON, or "" where the row does not fit; and the
        key it is kept by.

    Raises:
        InputError: a row does not fit and `on_bad_row` is "error"; the message names file, row and reason.
    """
    if settings.path is None:
        assert settings.identity is not None
        made = identity_conversations(**settings.identity.model_dump(), seed=settings.seed)
        key = content_key(json.dumps(made))
        table = rows_from(lambda: (_row(n, conversation=row) for n, row in enumerate(made, start=1)), _ROW_COLUMNS, key)
        report.read += len(table)
        return table, key
    check_format_name(settings.format)
    path = locate(settings.path)
    try:
        key = content_key(path, settings.format, str(settings.max_rows))
    except OSError:
        next(iter_rows(path), None)  # raises what it says of a file that cannot be read
        raise
    table = rows_from(
        lambda: _file_rows(path, settings),
        _ROW_COLUMNS,
        key,
        show_progress=path.stat().st_size > LARGE_FILE,
    )
    _account_for_rows(table, report)
    if settings.on_bad_row == "error" and report.dropped:  # the table was made when bad rows were left out
        raise _bad_row(path, *min((numbers[0], reason) for reason, numbers in report.dropped.items()))
    return table, key


def read_conversations(settings: DataSettings) -> tuple[list[Conversation], DataReport]:
    """The rows to measure a model on: those that `load_dataset` holds out, or all where `held_out` is 0; and the account of all.

    Raises:
        InputError: no row is there; else as `load_conversations`.
    """
    report = DataReport()
    table, _ = load_conversations(settings, report=report)
    wanted = {*_held_out_rows(table, settings)}
    rows = [
        json.loads(conversation)
        for number, conversation in _values(table, "row", "conversation")
        if conversation and (not settings.held_out or number in wanted)
    ]
    if not rows:
        raise InputError(f"{settings.path or 'the identity data'}: no row fits: {report.summary()}")
    report.kept = len(rows)
    return rows, report


def fit(example: Example, *, max_length: int, over_long: OverLong) -> list[Example]:
    """The example in parts of at most `max_length` tokens, those with nothing to train left out.

    `truncate` keeps the beginning, `split` cuts into parts one after the other, `drop` keeps nothing of an over-long one.
    """
    length = len(example.input_ids)
    if length <= max_length:
        return [example]
    ends = {"truncate": max_length, "split": length, "drop": 0}[over_long]
    parts = [
        Example(example.input_ids[start : start + max_length], example.labels[start : start + max_length])
        for start in range(0, ends, max_length)
    ]
    return [part for part in parts if part.trained_tokens]


def _file_rows(path: Path, settings: DataSettings) -> Iterator[dict[str, Any]]:
    """Yield every row of a file as `_ROW_COLUMNS`."""
    noted: defaultdict[int, list[str]] = defaultdict(list)
    rows = iter_rows(path, note=lambda number, text: noted[number].append(text))
    for number, _, outcome, notes in islice(converted_rows(rows, row_format=settings.format), settings.max_rows):
        if not isinstance(outcome, RowError):
            yield _row(number, conversation=outcome, notes=noted.pop(number, []) + notes)
        elif settings.on_bad_row == "error":
            raise _bad_row(path, number, str(outcome))
        else:
            yield _row(number, dropped=str(outcome), notes=noted.pop(number, []))
    for number, notes in noted.items():
        yield _row(number, notes=notes)


def _row(
    number: int, *, conversation: Conversation | None = None, dropped: str = "", notes: Sequence[str] = ()
) -> dict[str, Any]:
    return {
        "row": number,
        "conversation": json.dumps(conversation) if conversation else "",
        "dropped": _storable(dropped),
        "notes": [_storable(note) for note in notes],
    }


def _storable(text: str) -> str:
    """Text as a table can hold it: a reason may quote half of a surrogate pair."""
    return text.encode("utf-8", "backslashreplace").decode()


def _bad_row(path: Path, number: int, reason: str) -> InputError:
    return InputError(
        f"{path}: row {number}: {reason}; mend the row, or set data.on_bad_row=drop to leave such rows out"
    )


def _account_for_rows(table: datasets.Dataset, report: DataReport) -> None:
    """Count the rows of a file, and those that do not fit."""
    for number, conversation, dropped, notes in _values(table, "row", "conversation", "dropped", "notes"):
        report.read += bool(conversation or dropped)
        if dropped:
            report.drop(number, dropped)
        for note in notes:
            report.note(number, note)


def _held_out_rows(conversations: datasets.Dataset, settings: DataSettings) -> list[int]:
    """The numbers of the rows to hold out: all rows of a question or none, as many as come nearest to `held_out`.

    Questions are drawn in the order of their first rows, so where none repeats, rows are.

    Raises:
        InputError: all rows ask the same question.
    """
    if not settings.held_out:
        return []
    numbers, questions = [], []
    for number, conversation in _values(conversations, "row", "conversation"):
        if conversation:
            numbers.append(number)
            questions.append(hash(question_key(json.loads(conversation))))  # not the text: memory stays small
    _, first, group = np.unique(np.array(questions, dtype=np.int64), return_index=True, return_inverse=True)
    if len(first) == 1 < len(numbers):
        raise InputError(
            f"data.held_out = {settings.held_out}: all {len(numbers)} rows ask the same question, and one that is trained cannot be "
            "held out; set data.held_out=0, or give rows with other questions"
        )
    drawn = random.Random(settings.seed).sample(range(len(first)), min(settings.held_out, max(len(first) - 1, 0)))
    sizes = np.bincount(group)
    by_first_row = first.argsort()
    order = by_first_row[drawn].tolist()
    chosen = whole_groups(order, {name: int(sizes[name]) for name in order}, wanted=settings.held_out)
    return np.array(numbers)[np.isin(group, chosen)].tolist()


def _encode_batch(
    batch: dict[str, list[Any]],
    *,
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    protocol: AgentProtocol,
    max_length: int,
    over_long: OverLong,
    train_on: TrainOn,
) -> dict[str, list[Any]]:
    """Tokenise a batch of `_ROW_COLUMNS` and fit each example into `max_length`, as a batch of `_EXAMPLE_COLUMNS`."""
    out: dict[str, list[Any]] = {name: [] for name in _EXAMPLE_COLUMNS}
    numbers = [number for number, text in zip(batch["row"], batch["conversation"], strict=True) if text]
    conversations = [json.loads(text) for text in batch["conversation"] if text]
    encoded = encode_conversations(conversations, template, tokenizer, train_on=train_on, protocol=protocol)
    for number, example in zip(numbers, encoded, strict=True):
        parts: list[Example] = []
        if isinstance(example, RowError):
            outcomes = [_storable(str(example))]
        elif not example.trained_tokens:
            outcomes = [f"nothing to train (train_on: {train_on})"]
        elif parts := fit(example, max_length=max_length, over_long=over_long):
            whole = len(example.input_ids) <= max_length
            outcomes = [_KEPT if whole else _TRUNCATED if over_long == "truncate" else _SPLIT]
            outcomes += [_PART] * (len(parts) - 1)
        elif over_long == "drop":
            outcomes = ["longer than max_length"]
        else:
            outcomes = [f"nothing left to train within max_length {max_length}"]
        for outcome, part in zip(outcomes, parts or [Example([], [])], strict=True):
            out["row"].append(number)
            out["input_ids"].append(np.array(part.input_ids, dtype=np.int32))
            out["labels"].append(np.array(part.labels, dtype=np.int32))
            out["outcome"].append(outcome)
    return out


def _account_for_examples(table: datasets.Dataset, report: DataReport) -> tuple[Examples, np.ndarray]:
    """Count the rows kept, cut and dropped in tokenising; return the examples and the row each came from."""
    rows, places = [], []
    for place, (number, outcome) in enumerate(_values(table, "row", "outcome")):
        if outcome not in (_KEPT, _TRUNCATED, _SPLIT, _PART):
            report.drop(number, outcome)
            continue
        places.append(place)
        rows.append(number)
        report.kept += outcome != _PART
        report.truncated += outcome == _TRUNCATED
        if outcome == _SPLIT:
            report.note(number, "split because it is longer than max_length")
    return Examples(table, np.array(places, dtype=np.int64)), np.array(rows, dtype=np.int64)


def _values(table: datasets.Dataset, *columns: str) -> Iterator[tuple[Any, ...]]:
    """The values of some columns, row by row, a few thousand rows in memory at a time."""
    for batch in table.select_columns(list(columns)).with_format("arrow").iter(2000):
        yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
