"""Files as rows: JSON arrays, JSON Lines, one JSON object, each also gzipped; Excel sheets.

What a file is, its content says, not its suffix: XTuner's tutorial writes a JSON array into `.jsonl`.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from course_lib.data.conversation import shown
from course_lib.data.readers_json import JsonReader, why_broken
from course_lib.data.readers_sheet import iter_sheet_rows
from course_lib.errors import InputError
from course_lib.files import decode_text

Note = Callable[[int, str], None]  # row number, what was noted

_ZIP, _GZIP = b"PK\x03\x04", b"\x1f\x8b"
_OTHER_FILES = {
    b"PAR1": "is a Parquet file; write it as JSON Lines first: pandas.read_parquet(…).to_json(…, orient='records', lines=True)",
    b"\xd0\xcf\x11\xe0": "is an old Excel file; save it as .xlsx",
}
_BLANK = re.compile(r"[ \t\n\r]*")


def iter_rows(path: str | Path, *, note: Note | None = None) -> Iterator[tuple[int, Any]]:
    """Yield (row number, row), one parsed row in memory at a time; of a JSON array the text is held as well.

    Rows are counted from 1; rows of a sheet have the sheet's own numbers. `note` is told of keys that stand twice in
    one object, with the row's number.

    Raises:
        InputError: at the first row: the file cannot be read or is empty. At the row in question: text that is not
            UTF-8, or broken JSON (line and column are named).
    """
    path = Path(path)
    start = _first_bytes(path)
    if start == _ZIP or path.suffix.lower() in (".xlsx", ".xlsm"):
        yield from iter_sheet_rows(path)
        return
    for magic, what in _OTHER_FILES.items():
        if start.startswith(magic):
            raise InputError(f"{path}: {what}")
    lines = _filled_lines(path, gzipped=start.startswith(_GZIP))
    first_line, first = next(lines, (0, ""))
    if not first:
        raise InputError(f"{path}: is empty; it should hold at least one row")
    if first.lstrip()[0] == "[":
        yield from _array_rows(_rest(lines, first_line, first), path, first_line, note)
    else:
        yield from _line_rows(lines, first_line, first, path, note)


def read_rows(path: str | Path, *, note: Note | None = None) -> list[Any]:
    """Read all rows of a file; arguments and errors as `iter_rows`."""
    return [row for _, row in iter_rows(path, note=note)]


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file (looked in {Path.cwd()}); check the path") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; name a file inside it") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _filled_lines(path: Path, *, gzipped: bool) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of every line that is not blank. Lines end at "\\n" alone: a JSON text may hold U+2028."""
    try:
        with gzip.open(path) if gzipped else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                line = decode_text(raw, path, first_line=number)
                if line.strip():
                    yield number, line.removesuffix("\n")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: broken gzip ({error}); fetch or pack it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _rest(lines: Iterator[tuple[int, str]], first_line: int, first: str) -> str:
    """All text from the first line on. Blank lines are put back, so that an error names the right line."""
    pieces, last = [first], first_line
    for number, line in lines:
        pieces += ["\n" * (number - last), line]
        last = number
    return "".join(pieces)


def _line_rows(
    lines: Iterator[tuple[int, str]], first_line: int, first: str, path: Path, note: Note | None
) -> Iterator[tuple[int, Any]]:
    reader = JsonReader()
    row_number, line_number, line = 1, first_line, first
    while line:
        try:
            row = reader.read(line)
        except (ValueError, RecursionError) as error:
            row = _object_over_lines(reader, _rest(lines, line_number, line)) if row_number == 1 else None
            if row is None and row_number == 1 and not line.lstrip().startswith("{"):
                raise InputError(
                    f"{path}: holds no JSON (line {line_number} begins {shown(line[:30])}); rows are read from JSON, JSON Lines, "
                    "either of them gzipped, and Excel sheets (.xlsx); a table: pandas.read_csv(…).to_json(…, orient='records', lines=True)"
                ) from None
            if row is None:
                raise _broken(error, path, line_number) from None
        _tell(note, row_number, reader)
        yield row_number, row
        row_number += 1
        line_number, line = next(lines, (0, ""))


def _object_over_lines(reader: JsonReader, text: str) -> Any:
    """The one object that the whole file is, or None."""
    reader.take_notes()
    try:
        return reader.read(text)
    except (ValueError, RecursionError):
        return None


def _array_rows(text: str, path: Path, first_line: int, note: Note | None) -> Iterator[tuple[int, Any]]:
    """Rows of a JSON array, one after the other, so that notes and errors have a row and a line."""
    reader = JsonReader()
    position = _skip_blank(text, text.index("[") + 1)
    if text.startswith("]", position):
        raise InputError(f"{path}: is an empty list; it should hold at least one row")
    row_number, more = 1, True
    while more:
        try:
            row, end = reader.read_at(text, position)
        except (ValueError, RecursionError) as error:
            raise _broken(error, path, first_line, start_line=first_line + text.count("\n", 0, position)) from None
        _tell(note, row_number, reader)
        yield row_number, row
        row_number += 1
        end = _skip_blank(text, end)
        more = text.startswith(",", end)
        if not more and not text.startswith("]", end):
            raise _broken(json.JSONDecodeError("Expecting ',' delimiter", text, end), path, first_line)
        position = _skip_blank(text, end + 1)
    if position < len(text):
        raise _broken(json.JSONDecodeError("Extra data", text, position), path, first_line)


def _skip_blank(text: str, position: int) -> int:
    return _BLANK.match(text, position).end()  # type: ignore[union-attr]


def _broken(
    error: ValueError | RecursionError, path: Path, first_line: int, *, start_line: int | None = None
) -> InputError:
    """The error for a text that starts at `first_line`; `start_line` is where the value in question starts."""
    if isinstance(error, json.JSONDecodeError):
        line = first_line + error.lineno - 1
        return InputError(f"{path}: broken JSON at line {line}, column {error.colno}: {error.msg}")
    return InputError(f"{path}: {why_broken(error)}, in the value that starts at line {start_line or first_line}")


def _tell(note: Note | None, row_number: int, reader: JsonReader) -> None:
    for text in dict.fromkeys(reader.take_notes()):
        if note:
            note(row_number, text)
