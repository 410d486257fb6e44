"""Build `medication_qa_sample.xlsx` from `source/medication_qa.jsonl`: the same bytes on every machine with the tested openpyxl.

    python data/build_medication_qa_sample.py [OUT.xlsx]

A line of the source is [question, focus, type, answer, section]. The troubles of real sheets (non-breaking spaces, line
feeds, blanks at the ends, answers that say there is none, questions asked twice) stand in it as they are.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import zipfile
from pathlib import Path

os.environ["OPENPYXL_LXML"] = "False"  # lxml, where it is installed, writes the same XML in other bytes

from openpyxl import Workbook

FOLDER = Path(__file__).parent
SOURCE, TARGET = FOLDER / "source" / "medication_qa.jsonl", FOLDER / "medication_qa_sample.xlsx"
COLUMNS = ("Question", "Focus (Drug)", "Question Type", "Answer", "Section Title", "URL")  # those of the real sheet
NOTE = (
    "Written for a course on fine-tuning language models, for teaching only. It is not medical advice: it is incomplete, may be "
    "out of date, and was not reviewed by a doctor or pharmacist. Ask one before you take, change or stop a medicine."
)
MADE = "2026-01-01T00:00:00Z"


def workbook() -> Workbook:
    """The sheet `DrugQA`, and a sheet with the note."""
    book = Workbook()
    sheet = book.active
    sheet.title = "DrugQA"
    sheet.append(COLUMNS)
    for line in SOURCE.read_text(encoding="utf-8").splitlines():
        question, focus, kind, answer, section = json.loads(line)
        sheet.append((question, focus, kind, answer, section or None, url_of(focus, section)))
    book.create_sheet("Note").append((NOTE,))
    book.properties.title, book.properties.description, book.properties.creator = (
        "Medication QA sample",
        NOTE,
        "the course",
    )
    return book


def url_of(focus: str, section: str) -> str:
    """An address that leads nowhere (RFC 2606), where the real sheet names its source; `n/a` where there is no answer."""
    return "n/a" if section == "n/a" else f"https://example.org/medicines/{re.split('[ ,]', focus)[0].lower()}"


def fixed_bytes(book: Workbook) -> bytes:
    """The workbook's zip with fixed times, and stored: compressed bytes differ from one zlib to another."""
    saved, fixed = io.BytesIO(), io.BytesIO()
    book.save(saved)
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(fixed, "w", zipfile.ZIP_STORED) as new:
        for name in sorted(old.namelist(), key=lambda name: (name != "[Content_Types].xml", name)):
            content = old.read(name)
            if name == "docProps/core.xml":  # when it was made and changed, to the second
                content = re.sub(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", MADE.encode(), content)
            entry = zipfile.ZipInfo(name, date_time=(2026, 1, 1, 0, 0, 0))
            entry.create_system = 3  # else it tells the machine's system
            new.writestr(entry, content)
    return fixed.getvalue()


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else TARGET).write_bytes(fixed_bytes(workbook()))
