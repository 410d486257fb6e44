"""What is in a data file: every row accounted for, and what a careful person would want to know before training on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.data.conversation import Conversation, RowError
from course_lib.data.formats import check_format_name, converted_rows, detect_format, iter_rows
from course_lib.data.near_duplicates import NearDuplicates
from course_lib.data.report import DataReport
from course_lib.data.tokenize import encode_conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from course_lib.data.templates import ChatTemplate

LETTERS_TO_TELL = 24
_LANGUAGE_SAMPLE = 600  # characters a language is told by


@dataclass
class FileCheck:
    """The report on one file. Token figures are None without a tokenizer."""

    path: str
    report: DataReport
    formats: Counter[str] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)  # assistant turns a row -> rows
    tool_rows: int = 0
    tool_calls: int = 0
    empty_answers: int = 0  # assistant turns without words or calls
    duplicates: int = 0  # rows equal to an earlier one, but for white space and case
    near_duplicates: int = 0  # further rows that share most of their words with an earlier one
    languages: Counter[str] = field(default_factory=Counter)  # ISO 639-1 code -> rows
    token_lengths: list[int] | None = None
    trained_tokens: int = 0

    @property
    def row_format(self) -> str:
        """The one format of the rows, or `mixed`, or `none` where no row fits any."""
        return "mixed" if len(self.formats) > 1 else next(iter(self.formats), "none")

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, for `--json`."""
        report = self.report
        result: dict[str, Any] = {
            "path": self.path,
            "format": self.row_format,
            "rows": report.read,
            "kept": report.kept,
            "dropped": {reason: len(rows) for reason, rows in report.dropped.items()},
            "dropped_rows": report.dropped,
            "notes": {note: len(rows) for note, rows in report.notes.items()},
            "answers_per_row": dict(sorted(self.answers.items())),
            "multi_turn_rows": sum(rows for answers, rows in self.answers.items() if answers > 1),
            "tool_rows": self.tool_rows,
            "tool_calls": self.tool_calls,
            "empty_answers": self.empty_answers,
            "duplicates": self.duplicates,
            "near_duplicates": self.near_duplicates,
            "languages": dict(self.languages.most_common()),
        }
        if self.token_lengths is not None:
            lengths = sorted(self.token_lengths)
            total = sum(lengths)
            result["tokens"] = {
                "rows": len(lengths),
                "total": total,
                "trained": self.trained_tokens,
                "trained_share": round(self.trained_tokens / total, 4) if total else 0.0,
                "shortest": lengths[0] if lengths else 0,
                "median": lengths[len(lengths) // 2] if lengths else 0,
                "longest": lengths[-1] if lengths else 0,
                "histogram": length_histogram(lengths),
            }
        return result


def check_file(
    path: str | Path,
    *,
    row_format: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    template: ChatTemplate | None = None,
) -> FileCheck:
    """Read a file to its end and report on every row. With a tokenizer and a template, rows are measured in tokens too.

    Raises:
        InputError: the file cannot be read, or `row_format` is unknown. A row that does not fit is counted, not raised.
    """
    check_format_name(row_format)
    check = FileCheck(path=str(path), report=DataReport(), token_lengths=[] if tokenizer else None)
    near = NearDuplicates()
    seen: set[int] = set()
    rows = iter_rows(path, note=check.report.note)
    for number, conversation in _kept_rows(rows, row_format, check):
        if tokenizer is not None and template is not None and check.token_lengths is not None:
            try:
                example = encode_conversation(conversation, template, tokenizer)
            except RowError as reason:  # the row is sound: another template may have a form for it
                check.report.note(number, f"not measured in tokens: {reason}")
            else:
                check.token_lengths.append(len(example.input_ids))
                check.trained_tokens += example.trained_tokens
        check.report.kept += 1
        _look_at(conversation, check)
        words = _all_text(conversation).casefold().split()
        fingerprint = hash(tuple(words))
        if fingerprint in seen:
            check.duplicates += 1
        elif near.seen(words):
            check.near_duplicates += 1
        seen.add(fingerprint)
    return check


def length_histogram(lengths: list[int]) -> dict[str, int]:
    """Rows by token length, in bins that double: `1-32`, `33-64`, `65-128` and so on."""
    bins: Counter[int] = Counter(max(32, 1 << (length - 1).bit_length()) for length in lengths if length)
    if not bins:
        return {}
    tops = [top for top in (1 << power for power in range(5, max(bins).bit_length())) if top >= min(bins)]
    return {f"{1 if top == 32 else top // 2 + 1}-{top}": bins[top] for top in tops}


def _kept_rows(
    rows: Iterator[tuple[int, Any]], row_format: str, check: FileCheck
) -> Iterator[tuple[int, Conversation]]:
    for number, row, outcome, notes in converted_rows(rows, row_format=row_format):
        check.report.read += 1
        for note in notes:
            check.report.note(number, note)
        if isinstance(outcome, RowError):
            check.report.drop(number, str(outcome))
            continue
        check.formats[detect_format(row) if row_format == "auto" else row_format] += 1
        yield number, outcome


def _look_at(conversation: Conversation, check: FileCheck) -> None:
    messages = conversation.get("messages", [])
    said = [message for message in messages if message["role"] == "assistant"]
    calls = sum(len(message.get("tool_calls", [])) for message in said)
    check.answers[len(said)] += 1
    check.tool_rows += bool(calls or conversation.get("tools"))
    check.tool_calls += calls
    check.empty_answers += sum(not message["content"].strip() and not message.get("tool_calls") for message in said)
    check.languages[language_of(_human_text(conversation)[:_LANGUAGE_SAMPLE])] += 1


def language_of(text: str) -> str:
    """The ISO 639-1 code of the language a text is most likely written in, by langid (Lui & Baldwin 2012).

    `und` for texts too short to tell: a few words of English look like many languages.
    """
    import py3langid

    # an ideograph or a syllable says more than a letter, and a letter of a script that few languages use more than a Latin one
    weights = (
        4 if character >= "\u2e80" else 1 if character < "\u0250" else 2 for character in text if character.isalpha()
    )
    letters = sum(weights)
    return py3langid.classify(text)[0] if letters >= LETTERS_TO_TELL else "und"


def _human_text(conversation: Conversation) -> str:
    messages = conversation.get("messages")
    if messages is None:
        return conversation["text"]
    return " ".join(message["content"] for message in messages if message["role"] in ("user", "assistant"))


def _all_text(conversation: Conversation) -> str:
    messages = conversation.get("messages")
    if messages is None:
        return conversation["text"]
    return " ".join(f"{message['role']} {message['content']} {message.get('tool_calls', '')}" for message in messages)
