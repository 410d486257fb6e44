"""Checks of homework 04: conversations of many people, and what a held-out loss says."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

from course_lib.homework.checks import call, cases, close, fail, short


def thread(answer: Callable[..., Any], *, seed: int | None = None) -> None:
    """One conversation out of a tree of replies: at each turn the one people ranked best."""
    leaf = {"text": "Yes.", "role": "assistant", "rank": 0, "replies": []}
    worse = {
        "text": "No.",
        "role": "assistant",
        "rank": 1,
        "replies": [{"text": "Why?", "role": "user", "rank": 0, "replies": [leaf]}],
    }
    tried = [
        {"text": "Is tea hot?", "role": "user", "rank": 0, "replies": [worse, leaf]},
        {
            "text": "Hi",
            "role": "user",
            "rank": 0,
            "replies": [{**leaf, "replies": [{"text": "Thanks", "role": "user", "rank": 0, "replies": []}]}],
        },
        {
            "text": "Hi",
            "role": "user",
            "rank": 0,
            "replies": [{**leaf, "replies": [{"text": "And?", "role": "user", "rank": 0, "replies": [worse]}]}],
        },
    ]
    if more := cases(seed):
        replies = [{"text": f"reply {one}", "role": "assistant", "rank": one, "replies": []} for one in range(5)]
        more.shuffle(replies)
        tried.append({"text": "Many?", "role": "user", "rank": 0, "replies": replies})
    for tree in tried:
        wanted = _best_path(tree)
        given = call(answer, tree)
        shown = short(given)
        if given == wanted:
            continue
        if not isinstance(given, list) or not all(
            isinstance(one, dict) and set(one) == {"role", "content"} for one in given
        ):
            fail('a list of messages is wanted, each {"role", "content"}', shown)
        if given[-1:] and given[-1]["role"] != "assistant":
            fail("the last turn is the user's: there is nothing to learn behind it", shown)
        if len({one["content"] for one in given} - {one["content"] for one in wanted}):
            fail(
                "a reply was taken that people did not rank best: rank 0 is the best, whatever its place in the list",
                shown,
            )
        if len(given) < len(wanted):
            fail("the conversation ends too early: it goes on as long as there are replies", shown)
        fail("turns are doubled or in another order", shown)


def _best_path(node: dict[str, Any] | None) -> list[dict[str, str]]:
    path = []
    while node is not None:
        path.append({"role": node["role"], "content": node["text"]})
        node = min(node["replies"], key=lambda reply: reply["rank"]) if node["replies"] else None
    return path if path[-1]["role"] == "assistant" else path[:-1]


def best_step(answer: Callable[..., Any], *, seed: int | None = None) -> None:
    """The checkpoint with the least held-out loss, the earliest of equals."""
    tried = [
        ([(0, 2.0), (8, 1.7), (16, 1.6), (24, 1.8)], [1.9, 1.5, 1.1, 0.6]),
        ([(0, 1.5), (8, 1.6)], [1.4, 1.0]),
        ([(0, 2.0), (8, 1.5), (16, 1.5)], [2.0, 1.4, 1.2]),
    ]
    if more := cases(seed):
        tried.append(
            ([(step, more.random()) for step in range(0, 80, 8)], [1 - step / 100 for step in range(0, 80, 8)])
        )
    for held_out, training in tried:
        given = call(answer, list(held_out), list(training))
        wanted = min(held_out, key=lambda one: (one[1], one[0]))[0]
        if close(given, wanted):
            continue
        shown = f"held-out (step, loss) {short(held_out)}, training {short(training)}; yours {given}"
        if any(close(given, step) and loss == min(one[1] for one in held_out) for step, loss in held_out):
            fail("an earlier one is as good: it has forgotten less", shown)
        if close(given, held_out[training.index(min(training))][0]):
            fail("that is where the training loss is least: it falls on while the model learns by heart", shown)
        if close(given, held_out[-1][0]):
            fail("the last one is not the best for being last", shown)
        if close(given, [one[1] for one in held_out].index(min(one[1] for one in held_out))):
            fail("that is its place in the list: the step is wanted", shown)
        if close(given, min(one[1] for one in held_out)):
            fail("that is the loss: the step is wanted", shown)
        fail("another checkpoint has a lower held-out loss", shown)


def learning_rate(answer: Callable[..., Any], *, seed: int | None = None) -> None:
    """Linear warm-up, then half a cosine down to zero."""
    tried = [(1.0, 2, 10), (3e-4, 4, 20)]
    if more := cases(seed):
        tried.append((more.random(), more.randint(1, 9), more.randint(20, 60)))
    for peak, warmup, total in tried:
        value = partial(_rate, answer, peak, warmup, total)
        shown = f"peak {peak:g}, warm-up {warmup}, {total} steps"
        if close(value(0), 0.0, absolute=peak * 1e-6) is False and close(value(0), peak):
            fail("there is no warm-up: it starts at the peak", shown)
        if not close(value(warmup), peak):
            fail("the peak is not reached at the end of the warm-up", f"{shown}; at step {warmup}: {value(warmup):g}")
        for step in range(warmup):
            if not close(value(step), peak * step / warmup, absolute=peak * 1e-6):
                fail(
                    "the warm-up is not a straight line from 0 to the peak", f"{shown}; at step {step}: {value(step):g}"
                )
        if not close(value(total), 0.0, absolute=peak * 1e-6):
            fail("it does not end at zero", f"{shown}; at step {total}: {value(total):g}")
        middle = warmup + (total - warmup) / 2
        for step in range(warmup, total + 1):
            part = (step - warmup) / (total - warmup)
            if close(value(step), peak * (1 + math.cos(math.pi * part)) / 2, absolute=peak * 1e-6):
                continue
            if close(value(step), peak * (1 - part), absolute=peak * 1e-6):
                fail(
                    "that is a straight line down: a cosine stays high first, and then near zero",
                    f"{shown}; at step {step}",
                )
            fail(
                "not half a cosine from the end of the warm-up to the last step",
                f"{shown}; at step {step} ({'first' if step < middle else 'second'} half): {value(step):g}",
            )


def _rate(answer: Callable[..., Any], peak: float, warmup: int, total: int, step: int) -> float:
    return call(answer, step, peak, warmup, total)


def losses(seed: int) -> tuple[list[float], list[float]]:
    """Held-out losses of the same forty rows, before and after."""
    source = random.Random(3000 + seed)
    before = [source.uniform(1.0, 3.0) for _ in range(40)]
    return before, [one - source.gauss(0.06, 0.08) for one in before]


def verdict(answer: Callable[..., Any], *, seed: int | None = None) -> None:
    """The 95 % interval of the mean change, by the rows' own differences."""
    for number in (0, 1) if seed is None else (seed, seed + 1, seed + 2):
        before, after = losses(number)
        given = call(answer, list(before), list(after))
        if not isinstance(given, tuple | list) or len(given) != 2:
            fail("two numbers are wanted: the low end and the high end", short(given))
        low, high = (float(one) for one in given)
        changes = [b - a for a, b in zip(before, after, strict=True)]
        mean = sum(changes) / len(changes)
        deviation = math.sqrt(sum((one - mean) ** 2 for one in changes) / (len(changes) - 1))
        half = 1.96 * deviation / math.sqrt(len(changes))
        shown = f"yours ({low:.4f}, {high:.4f}), mean change {mean:.4f}"
        if low > high:
            fail("the low end is above the high end", shown)
        if close(low, -(mean + half), relative=0.1) and close(high, -(mean - half), relative=0.1):
            fail("the sign is wrong: the change is after minus before, and a loss that falls is negative", shown)
        if not low <= mean <= high:
            fail("the mean change lies outside: is the change after minus before, row by row?", shown)
        width = (high - low) / 2
        if close(width, 1.96 * deviation, relative=0.15):
            fail("this is the spread of single rows: the mean of n rows is surer, by the root of n", shown)
        spread = (
            math.sqrt(sum((one - sum(part) / 40) ** 2 for part in (before, after) for one in part) / 39 / 40) * 1.96
        )
        if close(width, spread, relative=0.15):
            fail("before and after are taken for different rows: pair them, and what rows differ in cancels", shown)
        if not close(width, half, relative=0.2):
            fail(f"the interval is {'wider' if width > half else 'narrower'} than 95 % asks for", shown)
