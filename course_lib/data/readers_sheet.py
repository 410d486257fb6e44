"""Rows of an Excel sheet with a column of questions and one of answers, such as MedQA's `DrugQA`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.data.conversation import shown
from course_lib.errors import CourseError, InputError

if TYPE_CHECKING:
    from openpyxl.worksheet._read_only import ReadOnlyWorksheet

COLUMNS = ("Question", "Answer")
FIRST_CHOICE = "DrugQA"  # the sheet's name in MedInfo2019-QA-Medications.xlsx


def iter_sheet_rows(path: Path, *, columns: tuple[str, str] = COLUMNS) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number, row) of the sheet `DrugQA`, or of the first one with the columns; numbers are the sheet's own.

    Columns are found by the header, the first row that is not empty; case and blanks are ignored. A row has `Question`
    and `Answer`, None where the cell is empty, and its other filled cells under their headers. Non-breaking spaces become
    spaces, outer blanks go, numbers become text. Empty rows are passed over, as blank lines of a text file are.

    Args:
        columns: the headers under which questions and answers stand.

    Raises:
        InputError: not a workbook, no sheet with the columns, or openpyxl is not installed.
    """
    try:
        from openpyxl import load_workbook
    except ImportError:
        raise InputError(f"{path}: reading Excel needs openpyxl; install it: pip install openpyxl") from None
    try:
        with path.open("rb") as file:
            workbook = load_workbook(file, read_only=True, data_only=True)
            sheets = sorted(workbook.worksheets, key=lambda sheet: sheet.title != FIRST_CHOICE)
            yield from _rows_of_first_fitting(sheets, columns, path)
    except CourseError:
        raise
    except Exception as error:  # zip, XML and openpyxl have many errors of their own for a damaged file
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{path}: cannot be read as an Excel workbook ({type(error).__name__}: {reason}); save it again as .xlsx"
        ) from None


def _rows_of_first_fitting(
    sheets: list[ReadOnlyWorksheet], columns: tuple[str, str], path: Path
) -> Iterator[tuple[int, dict[str, Any]]]:
    seen = []
    for sheet in sheets:
        sheet.reset_dimensions()  # some programs write a wrong size, which would hide cells
        numbered = (
            (number, [*map(clean_cell, cells)]) for number, cells in enumerate(sheet.iter_rows(values_only=True), 1)
        )
        filled = ((number, cells) for number, cells in numbered if any(cell is not None for cell in cells))
        header = _column_names(next(filled, (0, []))[1], columns)
        if all(column in header for column in COLUMNS):
            return (yield from _rows_under(header, filled, sheet.title, path))
        seen.append(f"{shown(sheet.title)} has {', '.join(name for name in header if name)[:120] or 'no header'}")
    raise InputError(
        f"{path}: no sheet has the columns {' and '.join(columns)}: {'; '.join(seen)[:400] or 'no sheets'}"
    )


def _rows_under(
    header: list[str], filled: Iterator[tuple[int, list[Any]]], title: str, path: Path
) -> Iterator[tuple[int, dict[str, Any]]]:
    twice = [column for column in COLUMNS if header.count(column) > 1]
    if twice:
        raise InputError(f"{path}: sheet {shown(title)} has more than one column {' and '.join(twice)}; rename one")
    empty = True
    for number, cells in filled:
        empty = False
        row = {name: cell for name, cell in zip(header, cells, strict=False) if name and cell is not None}
        yield number, {**dict.fromkeys(COLUMNS), **row}
    if empty:
        raise InputError(f"{path}: sheet {shown(title)} has a header and no rows")


def _column_names(cells: list[Any], columns: tuple[str, str]) -> list[str]:
    """Header cells as text; the two columns that are needed as `Question` and `Answer`, however they are written."""
    plain = {"".join(name.split()).casefold(): column for name, column in zip(columns, COLUMNS, strict=True)}
    names = ["" if cell is None else " ".join(str(cell).split()) for cell in cells]
    return [plain.get("".join(name.split()).casefold(), name) for name in names]


def clean_cell(value: Any) -> Any:
    """A cell's text with plain spaces and without outer blanks, or None where nothing is left; a number as text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value.replace("\N{NO-BREAK SPACE}", " ").strip() or None if isinstance(value, str) else value
