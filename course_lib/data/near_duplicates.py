"""Rows that share most of their words, found by MinHash (Broder 1997) and banding, one row at a time."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

_SHINGLE = 3  # words
_BANDS, _ROWS = 16, 4  # rows of a Jaccard similarity of 0.5 are candidates more likely than not, of 0.8 nearly always
_PRIME = (1 << 61) - 1
NEAR = 0.8  # Jaccard similarity from which two rows count as nearly the same


class NearDuplicates:
    """Remembers rows and says of each new one whether it is nearly one of them."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        hashes = _BANDS * _ROWS
        self._multipliers = generator.integers(1, 1 << 31, size=(hashes, 1), dtype=np.uint64)
        self._offsets = generator.integers(0, 1 << 31, size=(hashes, 1), dtype=np.uint64)
        self._shingles: list[np.ndarray] = []  # of each row kept, sorted uint64
        self._buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)

    def seen(self, words: Sequence[str]) -> bool:
        """Whether a row of these words is nearly an earlier one; a row that is not is remembered."""
        shingles = _shingle_hashes(words)
        if not len(shingles):
            return False
        signature = ((self._multipliers * shingles + self._offsets) % np.uint64(_PRIME)).min(axis=1)
        keys = [(band, signature[band * _ROWS : (band + 1) * _ROWS].tobytes()) for band in range(_BANDS)]
        candidates = {row for key in keys for row in self._buckets.get(key, ())}
        if any(_jaccard(shingles, self._shingles[row]) >= NEAR for row in candidates):
            return True
        for key in keys:
            self._buckets[key].append(len(self._shingles))
        self._shingles.append(shingles)
        return False


def _shingle_hashes(words: Sequence[str]) -> np.ndarray:
    """Distinct hashes of all runs of three words, uint64, sorted; of a text without spaces, of three characters."""
    if len(words) < 2 * _SHINGLE and sum(map(len, words)) > 4 * _SHINGLE:
        words = list("".join(words))
    hashes = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words], dtype=np.uint64)
    if len(hashes) < _SHINGLE:
        return np.unique(hashes)
    first, second, third = hashes[:-2], hashes[1:-1], hashes[2:]
    mixed = (first * np.uint64(31) + second) * np.uint64(31) + third
    return np.unique(mixed % np.uint64(1 << 32))


def _jaccard(first: np.ndarray, second: np.ndarray) -> float:
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)
