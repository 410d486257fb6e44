"""Tokenised examples on disk, taken out one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, overload

import numpy as np

from course_lib.data.tokenize import Example

if TYPE_CHECKING:
    import datasets


class Examples(Sequence[Example]):
    """Some rows of a memory-mapped table with columns `input_ids` and `labels`.

    Attributes:
        lengths: int32, shape (examples,): tokens of each example, known without reading them.
    """

    def __init__(self, table: datasets.Dataset, places: np.ndarray, lengths: np.ndarray | None = None) -> None:
        """Take the rows that stand at `places` (int64, shape (examples,)) of the table."""
        self._table = table
        self._places = places
        self.lengths = _lengths(table)[places] if lengths is None else lengths

    def where(self, mask: np.ndarray) -> Examples:
        """The examples for which `mask` (bool, shape (examples,)) is true."""
        return Examples(self._table, self._places[mask], self.lengths[mask])

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples(self._table, self._places[index], self.lengths[index])
        row = self._table[int(self._places[index])]
        return Example(row["input_ids"], row["labels"])

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


def _lengths(table: datasets.Dataset) -> np.ndarray:
    import pyarrow.compute

    chunks = table.data.column("input_ids").chunks
    lengths = [pyarrow.compute.list_value_length(chunk).to_numpy(zero_copy_only=False) for chunk in chunks]
    return np.concatenate([np.zeros(0, dtype=np.int32), *lengths]).astype(np.int32)
