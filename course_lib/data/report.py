"""The account of a file's rows."""

from __future__ import annotations

from dataclasses import dataclass, field


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


def _reasons(rows_of: dict[str, list[int]]) -> str:
    return "; ".join(f"{reason}: row{'s' if len(rows) > 1 else ''} {_few(rows)}" for reason, rows in rows_of.items())


def _few(rows: list[int], most: int = 8) -> str:
    shown = ", ".join(map(str, rows[:most]))
    return shown + (f" and {len(rows) - most} more" if len(rows) > most else "")
