"""Build `openassistant_sample.jsonl` from `source/conversations_*.txt`, in the text form of openassistant-guanaco.

    python data/build_openassistant_sample.py [OUT.jsonl]

In a source a conversation begins with a line `== SUBJECT`, a question with `H: ` and an answer with `A: `; every other line goes on
with the turn. Rows are put into the order of a hash of their text, so that subjects and languages are mixed.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
TARGET = FOLDER / "openassistant_sample.jsonl"
MARKS = {"H": "### Human: ", "A": "### Assistant: "}


def rows() -> list[str]:
    """The text of every conversation, in the order of the file."""
    texts = [
        guanaco_text(block, source.name)
        for source in sorted(FOLDER.glob("source/conversations_*.txt"))
        for block in re.split(r"(?m)^== .*\n", source.read_text(encoding="utf-8"))[1:]
    ]
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())


def guanaco_text(block: str, where: str) -> str:
    """A conversation as one text: every turn behind its mark, nothing between them."""
    before, *pieces = re.split(r"(?m)^([HA]): ", block)
    who = "".join(pieces[::2])
    if before.strip() or not who or who != "HA" * (len(who) // 2):
        raise SystemExit(f"{where}: turns are {who or 'missing'}, not a question and an answer in turn: {block[:60]!r}")
    return "".join(MARKS[mark] + text.strip() for mark, text in zip(who, pieces[1::2], strict=True))


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else TARGET)
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in rows())
    target.write_text("".join(lines), encoding="utf-8", newline="\n")
