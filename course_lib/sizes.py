"""Sizes of memory and files in text: GB are 10⁹ bytes, GiB are 2³⁰."""

from __future__ import annotations

import re

from course_lib.errors import InputError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(text: str | int, *, of: str, bare: bool = True) -> int:
    """Bytes that a text such as `8GiB`, `500 MB` or `1.5g` says; `bare` numbers are bytes.

    Raises:
        InputError: it is no size, or less than a byte; `of` names what was to have it.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*(|[KMGT]I?)B?", str(text).strip().upper())
    number = round(float(match[1]) * UNITS[match[2]]) if match else 0
    if match is None or number < 1 or not (bare or match[2]):
        plain = "a number of bytes, or " if bare else ""
        raise InputError(f"{of} {text!r} is no size: write {plain}such as 500MB, 8GB (10⁹ bytes) or 8GiB (2³⁰)")
    return number


def in_gb(size: float, digits: int = 2) -> str:
    """A size in units of 10⁹ bytes, as `1.69 GB`."""
    return f"{size / 10**9:,.{digits}f} GB"


def in_gib(size: float, digits: int = 1) -> str:
    """A size in units of 2³⁰ bytes, as `7.8 GiB`: what a card of 8 GB is sold by."""
    return f"{size / 2**30:,.{digits}f} GiB"
