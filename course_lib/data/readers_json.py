"""JSON that remembers keys written twice, which Python's `json` merges without a word: the last one wins."""

from __future__ import annotations

import json
from typing import Any

from course_lib.data.conversation import RowError, shown


class JsonReader:
    """Python's `json`, and a note for every key that stands twice in one object.

    As there, `NaN`, `Infinity` and numbers too large for a float (1e400, read as infinity) are accepted.
    """

    def __init__(self) -> None:
        self._notes: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def read(self, text: str) -> Any:
        """The value of a whole text.

        Raises:
            ValueError: broken JSON (`json.JSONDecodeError`), or an integer of thousands of digits.
            RecursionError: nested too deeply.
        """
        return self._decoder.decode(text)

    def read_at(self, text: str, position: int) -> tuple[Any, int]:
        """The value that starts at `position`, and the position behind it. Raises as `read`."""
        return self._decoder.raw_decode(text, position)

    def take_notes(self) -> list[str]:
        """Notes since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        merged = dict(pairs)
        if len(merged) < len(pairs):
            seen: set[str] = set()
            twice = {key for key, _ in pairs if key in seen or seen.add(key)}
            self._notes += [
                f"key {shown(key)} stands twice in one object: the last one counts" for key in sorted(twice)
            ]
        return merged


def why_broken(error: ValueError | RecursionError) -> str:
    """What is wrong with a JSON text, without the place."""
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    return f"broken JSON: {error.msg}" if isinstance(error, json.JSONDecodeError) else f"bad number in JSON: {error}"


def read_json_text(text: str, where: str, notes: list[str]) -> Any:
    """The value of JSON inside a field of a row, such as the arguments of a tool call.

    Raises:
        RowError: broken JSON (where in the field, and what stands there).
    """
    reader = JsonReader()
    try:
        value = reader.read(text)
    except json.JSONDecodeError as error:
        near = shown(text[max(error.pos - 20, 0) : error.pos + 20])
        raise RowError(f"{where}: {why_broken(error)} at character {error.pos + 1}, near {near}") from None
    except (ValueError, RecursionError) as error:
        raise RowError(f"{where}: {why_broken(error)}") from None
    notes += reader.take_notes()
    return value
