"""A recipe's rows as tokenised examples, with every row accounted for."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from course_lib.data.conversation import Conversation, RowError
from course_lib.data.formats import read_rows, to_conversation
from course_lib.data.identity import identity_conversations
from course_lib.data.sources import locate
from course_lib.data.tokenize import Example, encode_conversation
from course_lib.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from course_lib.data.templates import ChatTemplate
    from course_lib.recipe import DataSettings


@dataclass
class DataReport:
    """What became of every row. `dropped` maps a reason to the numbers of its rows, counted from 1."""

    read: int = 0
    kept: int = 0
    truncated: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)

    def drop(self, number: int, reason: str) -> None:
        """Count row `number` as dropped for `reason`."""
        self.dropped.setdefault(reason, []).append(number)

    def summary(self) -> str:
        """One line: rows read, kept, truncated, dropped and why."""
        line = f"{self.read} rows read, {self.kept} kept, {self.truncated} truncated, {sum(map(len, self.dropped.values()))} dropped"
        reasons = [f"{reason}: row{'s' if len(rows) > 1 else ''} {_few(rows)}" for reason, rows in self.dropped.items()]
        return line + (f" ({'; '.join(reasons)})" if reasons else "")


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
    path = locate(settings.path)
    rows = read_rows(path)
    if settings.max_rows is not None:
        rows = rows[: settings.max_rows]
    report.read += len(rows)
    kept = []
    for number, row in enumerate(rows, start=1):
        try:
            kept.append((number, to_conversation(row, row_format=settings.format)))
        except RowError as reason:
            if settings.on_bad_row == "error":
                raise InputError(
                    f"{path}: row {number}: {reason}; mend the row, or set data.on_bad_row=drop to leave such rows out"
                ) from None
            report.drop(number, str(reason))
    return kept


def encode_rows(
    rows: Iterable[tuple[int, Conversation]],
    *,
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    report: DataReport,
) -> list[Example]:
    """Tokenise rows and cut them to `max_length` tokens from the right; a row left with nothing to train is dropped and counted."""
    examples = []
    for number, row in rows:
        try:
            example = encode_conversation(row, template, tokenizer)
        except RowError as reason:
            report.drop(number, str(reason))
            continue
        cut = Example(example.input_ids[:max_length], example.labels[:max_length])
        if not cut.trained_tokens:
            report.drop(number, f"nothing left to train within max_length {max_length}")
            continue
        report.truncated += len(cut.input_ids) < len(example.input_ids)
        report.kept += 1
        examples.append(cut)
    return examples


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
    encode = {"template": template, "tokenizer": tokenizer, "max_length": settings.max_length, "report": report}
    train = encode_rows((row for row in rows if row[0] not in held_out_numbers), **encode)
    held_out = encode_rows((row for row in rows if row[0] in held_out_numbers), **encode)
    if not train:
        raise InputError(f"{settings.path or 'the identity data'}: no row is left to train on: {report.summary()}")
    return Dataset(train=train, held_out=held_out, report=report)


def _few(rows: list[int], most: int = 8) -> str:
    shown = ", ".join(map(str, rows[:most]))
    return shown + (f" and {len(rows) - most} more" if len(rows) > most else "")
