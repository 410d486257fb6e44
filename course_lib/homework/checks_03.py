"""Checks of homework 03: packing."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from course_lib.homework.checks import call, cases, close, fail, short


def positions(answer: Callable[..., Any], *, seed: int | None = None) -> None:
    """Positions of the tokens of a pack: each sample counts anew."""
    tried = [[3, 2], [1], [4, 1, 2]]
    if more := cases(seed):
        tried.append([more.randint(1, 9) for _ in range(6)])
    for lengths in tried:
        given = [int(one) for one in call(answer, list(lengths))]
        shown = f"lengths {lengths} -> {short(given)}"
        if given == [place for length in lengths for place in range(length)]:
            continue
        if len(given) != sum(lengths):
            fail(f"a pack of {sum(lengths)} tokens has as many positions", shown)
        if given == list(range(sum(lengths))):
            fail("the positions run on: the second sample would look as if it stood far behind the first", shown)
        if given == [place + 1 for length in lengths for place in range(length)]:
            fail("positions count from 0: the model was trained so", shown)
        if given == [number for number, length in enumerate(lengths) for _ in range(length)]:
            fail("these are the numbers of the samples, not positions in them", shown)
        fail("each sample's positions count from its own start", shown)


def visible(answer: Callable[..., Any], *, seed: int | None = None) -> None:
    """Who may look at whom: True at (query, key)."""
    tried = [[2, 1], [1, 3, 2]]
    if more := cases(seed):
        tried.append([more.randint(1, 4) for _ in range(4)])
    for lengths in tried:
        rows = call(answer, list(lengths))
        given = [[bool(one) for one in row] for row in rows]
        owner = [number for number, length in enumerate(lengths) for _ in range(length)]
        size = len(owner)
        shown = f"lengths {lengths}: " + " ".join("".join(str(int(one)) for one in row) for row in given)
        if len(given) != size or any(len(row) != size for row in given):
            fail(f"the table has {size} rows and columns, one a token of the pack", shown)
        for query in range(size):
            for key in range(size):
                if given[query][key] == (owner[query] == owner[key] and key <= query):
                    continue
                if owner[query] != owner[key] and given[query][key]:
                    fail(
                        f"token {query} sees token {key} of another sample: the packed loss would be another than the unpacked",
                        shown,
                    )
                if key > query:
                    fail(
                        f"token {query} sees token {key}, which comes after it: it would read the answer it is to predict",
                        shown,
                    )
                if key == query:
                    fail("a token does not see itself", shown)
                fail(f"token {query} does not see token {key} of its own sample", shown)


def packs(answer: Callable[..., Any], *, seed: int | None = None) -> None:
    """Every example in exactly one pack, none too full, and no more packs than first-fit decreasing needs."""
    tried = [([5, 5, 5, 5], 10), ([6, 4, 7, 3, 2, 8], 10), ([4, 8, 1, 4, 2, 1], 10), ([10], 10)]
    if more := cases(seed):
        tried.append(([more.randint(1, 60) for _ in range(50)], 64))
    for lengths, most in tried:
        given = call(answer, list(lengths), most)
        try:
            given = [[int(one) for one in pack] for pack in given]
        except (TypeError, ValueError):
            fail("a list of packs is wanted, each a list of the numbers of its examples", short(given))
        shown = f"lengths {short(lengths)}, at most {most} -> {short(given)}"
        placed = [one for pack in given for one in pack]
        if any(not 0 <= one < len(lengths) for one in placed):
            fail("a number that is no example's: packs hold the numbers of examples, from 0, not their lengths", shown)
        if len(set(placed)) < len(placed):
            fail("an example stands in two packs: it would be trained twice", shown)
        if len(placed) < len(lengths):
            fail(f"example {min(set(range(len(lengths))) - set(placed))} is lost", shown)
        for pack in given:
            if (size := sum(lengths[one] for one in pack)) > most:
                fail(f"a pack holds {size} tokens and {most} is the most", shown)
        if any(not pack for pack in given):
            fail("a pack is empty", shown)
        bound = _first_fit_decreasing(lengths, most)
        if len(given) > bound:
            fail(
                f"{len(given)} packs, and {bound} are enough: are long examples placed first, and every open pack tried?",
                shown,
            )


def _first_fit_decreasing(lengths: list[int], most: int) -> int:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = next((place for place, room in enumerate(rooms) if room >= length), None)
        if place is None:
            rooms.append(most - length)
        else:
            rooms[place] -= length
    return len(rooms)


def lengths_of(seed: int) -> list[int]:
    """Tokens of the rows of a small data set."""
    source = random.Random(2000 + seed)
    return [min(256, int(source.lognormvariate(4, 0.8)) + 4) for _ in range(40)]


def padding(answer: Any, lengths: list[int], batch: int) -> None:
    """Pad tokens of batches in the order given."""
    if answer is ...:
        raise NotImplementedError
    groups = [lengths[start : start + batch] for start in range(0, len(lengths), batch)]
    if close(answer, sum(max(group) * len(group) - sum(group) for group in groups)):
        return
    for diagnosis, value in {
        "that is padded to the longest of all: each batch is padded to its own longest": max(lengths) * len(lengths)
        - sum(lengths),
        "these are all tokens of the batches: take those away that are real": sum(
            max(group) * len(group) for group in groups
        ),
        "these are the real tokens": sum(lengths),
        "that is padded to 256: a batch is as long as its longest row": 256 * len(lengths) - sum(lengths),
    }.items():
        if close(answer, value):
            fail(diagnosis, f"yours is {answer}")
    ordered = sorted(lengths)
    groups = [ordered[start : start + batch] for start in range(0, len(ordered), batch)]
    if close(answer, sum(max(group) * len(group) - sum(group) for group in groups)):
        fail("that is for rows sorted by length: here they come as they stand", f"yours is {answer}")
    fail(
        "for each batch: its longest row, times its rows, without its real tokens",
        f"yours is {answer}; first batch {lengths[:batch]}",
    )


def step_loss(answer: Callable[..., Any], *, seed: int | None = None) -> None:
    """The loss of a step of several micro-batches: over all trained tokens."""
    tried = [[(12.0, 4), (30.0, 6)], [(2.0, 1), (90.0, 99)], [(5.0, 5), (0.0, 0)]]
    if more := cases(seed):
        tried.append([(more.uniform(1, 99), more.randint(1, 40)) for _ in range(5)])
    for parts in tried:
        given = call(answer, list(parts))
        total, count = sum(part[0] for part in parts), sum(part[1] for part in parts)
        if close(given, total / count):
            continue
        shown = f"(sum of losses, trained tokens): {short(parts)}; yours {float(given):.4f}"
        whole = [part for part in parts if part[1]]
        if close(given, sum(part[0] / part[1] for part in whole) / len(whole)):
            fail("this is a mean of the micro-batches' means: a token of a small one would weigh more", shown)
        if close(given, total / len(parts)):
            fail("divided by the number of micro-batches: divide by the trained tokens", shown)
        if close(given, total):
            fail(
                "this is the sum: 4 x 1 and 1 x 4 would then agree, but another batch size would be another learning rate",
                shown,
            )
        fail("the sum of all losses over the number of all trained tokens", shown)
