"""A recipe's rows as tokenised examples, with every row accounted for."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Literal

from course_lib.data.conversation import Conversation, RowError
from course_lib.data.formats import assemble_rows, check_format_name, iter_rows, to_conversation
from course_lib.data.identity import identity_conversations
from course_lib.data.sources import locate
from course_lib.data.tokenize import Example, TrainOn, encode_conversation
from course_lib.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from course_lib.data.templates import ChatTemplate
    from course_lib.recipe import DataSettings

OverLong = Literal["truncate", "split", "drop"]


@dataclass
class DataReport:
    """What became of every row. `dropped` maps a reason to the numbers of its rows, counted from 1 (a sheet's rows have the
    sheet's numbers); `notes` maps what a rule left off, or read in its own way, to the rows it did so in."""

    read: int = 0
    kept: int = 0
    truncated: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    notes: dict[str, list[int]] = field(default_factory=dict)

    def drop(self, number: int, reason: str) -> None:
        """Count row `number` as dropped for `reason`."""
        self.dropped.setdefault(reason, []).append(number)

    def note(self, number: int, text: str) -> None:
        """Count `text` as noted of row `number`, once."""
        numbers = self.notes.setdefault(text, [])
        if numbers[-1:] != [number]:
            numbers.append(number)

    def summary(self) -> str:
        """One line: rows read, kept, truncated, dropped and why, and what was noted."""
        line = f"{self.read} rows read, {self.kept} kept, {self.truncated} truncated, {sum(map(len, self.dropped.values()))} dropped"
        reasons, noted = _reasons(self.dropped), _reasons(self.notes)
        return line + (f" ({reasons})" if reasons else "") + (f"; noted: {noted}" if noted else "")


@dataclass(frozen=True)
class Dataset:
    """Examples to train on, examples held out, and the account of the rows they came from."""

    train: list[Example]
    held_out: list[Example]
    report: DataReport


def load_conversations(settings: DataSettings, *, report: DataReport) -> list[tuple[int, Conversation]]:
    """Read the rows a recipe names, as (row number, conversation).

    Raises:
        InputError: a row does not fit and `on_bad_row` is "error"; the message names file, row and reason.
    """
    if settings.path is None:
        assert settings.identity is not None
        rows = identity_conversations(**settings.identity.model_dump(), seed=settings.seed)
        report.read += len(rows)
        return list(enumerate(rows, start=1))
    check_format_name(settings.format)
    path = locate(settings.path)
    rows = assemble_rows(iter_rows(path, note=report.note), row_format=settings.format)
    kept = []
    for number, row in islice(rows, settings.max_rows):
        report.read += 1
        notes: list[str] = []
        try:
            kept.append((number, to_conversation(row, row_format=settings.format, notes=notes)))
        except RowError as reason:
            if settings.on_bad_row == "error":
                raise InputError(
                    f"{path}: row {number}: {reason}; mend the row, or set data.on_bad_row=drop to leave such rows out"
                ) from None
            report.drop(number, str(reason))
        else:
            for note in notes:
                report.note(number, note)
    return kept


def encode_rows(
    rows: Iterable[tuple[int, Conversation]],
    *,
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    report: DataReport,
    over_long: OverLong = "truncate",
    train_on: TrainOn = "all",
) -> list[Example]:
    """Tokenise rows and fit them into `max_length` tokens. A row left with nothing to train is dropped and counted."""
    examples = []
    for number, row in rows:
        try:
            example = encode_conversation(row, template, tokenizer, train_on=train_on)
        except RowError as reason:
            report.drop(number, str(reason))
            continue
        if not example.trained_tokens:
            report.drop(number, f"nothing to train (train_on: {train_on})")
            continue
        parts = fit(example, max_length=max_length, over_long=over_long)
        if not parts:
            report.drop(
                number,
                "longer than max_length"
                if over_long == "drop"
                else f"nothing left to train within max_length {max_length}",
            )
            continue
        if len(example.input_ids) > max_length:
            if over_long == "truncate":
                report.truncated += 1
            else:
                report.note(number, "split because it is longer than max_length")
        report.kept += 1
        examples += parts
    return examples


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


def load_dataset(settings: DataSettings, *, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Read, tokenise and split a recipe's data: `held_out` rows are chosen by the seed, and never trained on.

    Raises:
        InputError: nothing is left to train on.
    """
    report = DataReport()
    rows = load_conversations(settings, report=report)
    held_out_numbers: set[int] = set()
    if settings.held_out:
        numbers = [number for number, _ in rows]
        held_out_numbers = set(
            random.Random(settings.seed).sample(numbers, min(settings.held_out, max(len(numbers) - 1, 0)))
        )
    encode = {
        "template": template,
        "tokenizer": tokenizer,
        "max_length": settings.max_length,
        "over_long": settings.over_long,
        "train_on": settings.train_on,
        "report": report,
    }
    train = encode_rows((row for row in rows if row[0] not in held_out_numbers), **encode)
    held_out = encode_rows((row for row in rows if row[0] in held_out_numbers), **encode)
    if not train:
        raise InputError(f"{settings.path or 'the identity data'}: no row is left to train on: {report.summary()}")
    return Dataset(train=train, held_out=held_out, report=report)


def _reasons(rows_of: dict[str, list[int]]) -> str:
    return "; ".join(f"{reason}: row{'s' if len(rows) > 1 else ''} {_few(rows)}" for reason, rows in rows_of.items())


def _few(rows: list[int], most: int = 8) -> str:
    shown = ", ".join(map(str, rows[:most]))
    return shown + (f" and {len(rows) - most} more" if len(rows) > most else "")
