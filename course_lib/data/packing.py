"""Packing: which examples share a row of at most `max_length` tokens.

Samples in a pack stay isolated: positions restart at each one and attention does not cross (training/attention.py).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Literal

PackingStrategy = Literal["none", "best-fit"]


def plan_packs(lengths: Sequence[int], *, max_length: int, strategy: PackingStrategy) -> list[list[int]]:
    """Group example numbers into packs.

    Args:
        lengths: tokens of each example, each at most `max_length`.
        strategy: `none` gives one example a pack; `best-fit` puts each example, longest first, into the pack
            it leaves least room in (best-fit decreasing, Johnson 1973).

    Returns:
        Packs of example numbers; every example stands in exactly one.
    """
    if strategy == "none":
        return [[number] for number in range(len(lengths))]
    packs: list[list[int]] = []
    open_packs: list[tuple[int, int]] = []  # (room left, pack number), sorted
    for number in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[number]
        if length > max_length:
            raise ValueError(f"example {number} has {length} tokens, more than max_length {max_length}")
        at = bisect.bisect_left(open_packs, (length, -1))
        if at == len(open_packs):
            packs.append([])
            room, pack = max_length, len(packs) - 1
        else:
            room, pack = open_packs.pop(at)
        packs[pack].append(number)
        if room > length:
            bisect.insort(open_packs, (room - length, pack))
    return packs
