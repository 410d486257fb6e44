"""Checks of homework 05: a spreadsheet of your own, cleaned, split and scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from course_lib.homework.checks import call, cases, close, fail, short


def row(answer: Callable[..., Any], *, seed: int | None = None) -> None:
    """One line of the sheet as a conversation, or None where there is nothing to train."""
    tried = [
        ({"Question": "how much aspirin", "Answer": "Ask a doctor."}, ("how much aspirin", "Ask a doctor.")),
        ({"Question": "  is it safe\xa0", "Answer": "\nYes. \n"}, ("is it safe", "Yes.")),
        ({"Question": "and this", "Answer": None}, None),
        ({"Question": "   ", "Answer": "No."}, None),
        ({"Question": 1, "Answer": 20.5}, ("1", "20.5")),
    ]
    for line, wanted in tried:
        try:
            given = answer(dict(line))
        except NotImplementedError:
            raise
        except Exception as error:
            fail(
                f"your function stopped with {type(error).__name__}: a sheet has empty cells (None), and numbers",
                short(line),
            )
        shown = f"{short(line)} -> {short(given)}"
        if wanted is None:
            if given is not None and "'None'" in repr(given):
                fail("an empty cell became the word for nothing", shown)
            if given is not None:
                fail("a row without a question, or without an answer, is kept: there is nothing to learn in it", shown)
            continue
        if given is None:
            fail("a good row is thrown away", shown)
        messages = given.get("messages") if isinstance(given, dict) else None
        if not isinstance(messages, list) or [one.get("role") for one in messages] != ["user", "assistant"]:
            fail('a conversation is wanted: {"messages": [user, assistant]}', shown)
        texts = tuple(one.get("content") for one in messages)
        if any(not isinstance(one, str) for one in texts):
            fail("a content is not text: cells of a sheet may be numbers", shown)
        if tuple(one.strip() for one in texts) == wanted != texts:
            fail(
                "white space at the ends is kept: it would be learnt, and an answer beginning with it has other tokens",
                shown,
            )
        if texts != wanted:
            fail("the texts are not those of the cells", shown)


def rows_of_sheet(seed: int) -> list[dict[str, str]]:
    """Rows of which several ask the same, written differently."""
    import random

    source = random.Random(4000 + seed)
    topics = ["aspirin", "ibuprofen", "insulin", "warfarin", "codeine", "zinc", "iron", "statins", "iodine", "senna"]
    rows = []
    for topic in topics:
        base = f"How is {topic} taken?"
        ways = [base, base.lower(), base.rstrip("?"), f" {base.replace(' ', '  ')}", base.upper()]
        rows += [
            {"Question": way, "Answer": f"{topic} {number}"}
            for number, way in enumerate(source.sample(ways, source.randint(1, 4)))
        ]
    source.shuffle(rows)
    return rows


def split(answer: Callable[..., Any], *, seed: int | None = None) -> None:
    """Training and test rows with whole questions on each side, the same every time."""
    for number in (0, 1) if seed is None else range(seed, seed + 8):
        rows = rows_of_sheet(number)
        result = call(answer, [dict(one) for one in rows], 0.3)
        if not isinstance(result, tuple | list) or len(result) != 2:
            fail("two lists are wanted: training rows and test rows", short(result))
        train, test = result
        keys = [{_key(one["Question"]): one["Question"] for one in part} for part in (train, test)]
        if both := sorted(set(keys[0]) & set(keys[1])):
            first = both[0]
            fail(
                "one question is on both sides: the test asks what was learnt by heart",
                f"{keys[0][first]!r} to train, {keys[1][first]!r} to test",
            )
        placed = Counter(str(sorted(one.items())) for one in [*train, *test])
        if placed != Counter(str(sorted(one.items())) for one in rows):
            fail("rows were lost, doubled or changed", f"{len(train)} + {len(test)} of {len(rows)}")
        if not 0.1 <= len(test) / len(rows) <= 0.5:
            fail(f"{len(test)} of {len(rows)} rows to test is far from three tenths")
        if call(answer, [dict(one) for one in rows], 0.3) != result:
            fail("another call gives another split: nobody could compare two runs")


def _key(question: str) -> str:
    return " ".join(question.lower().split()).rstrip("?!. ")


def similar(answer: Callable[..., Any], *, seed: int | None = None) -> None:
    """Jaccard similarity of the sets of words."""
    tried = [
        ("how is iron taken", "how is zinc taken every day", 3 / 7),
        ("is it safe", "is it safe", 1.0),
        ("Is it safe?", "is it SAFE", 1.0),
        ("one two", "three four", 0.0),
        ("a a a b", "a b b b", 1.0),
        ("", "", 1.0),
    ]
    if more := cases(seed):
        words = [f"w{one}" for one in range(9)]
        one, two = (more.choices(words, k=7) for _ in range(2))
        tried.append((" ".join(one), " ".join(two), len({*one} & {*two}) / len({*one} | {*two})))
    for first, second, wanted in tried:
        given = call(answer, first, second)
        if close(given, wanted):
            continue
        a, b = first.lower().split(), second.lower().split()
        shown = f"{first!r} and {second!r}: yours {given}"
        if a and len({*a} & {*b}) and close(given, len({*a} & {*b}) / max(len({*a}), len({*b}))):
            fail("divided by the larger set: divide by all words that are in one of them or both", shown)
        if a and close(given, len({*a} & {*b}) / len({*a})):
            fail("divided by the words of the first alone: swapped, it would be another number", shown)
        if first.lower() != first or not first.replace(" ", "").isalpha():
            fail("letters, or signs at the end of a word, make a difference and should not", shown)
        if len({*a}) < len(a):
            fail("a word is counted every time it stands there: sets hold it once", shown)
        fail("words in both, over words in one of them or both", shown)


def f1(answer: Callable[..., Any], *, seed: int | None = None) -> None:
    """Token F1 of an answer against the right one, with counts."""
    tried = [
        ("take one pill", "take one pill", 1.0),
        ("take two", "take one pill", 2 * 0.5 * (1 / 3) / (0.5 + 1 / 3)),
        ("no", "yes", 0.0),
        ("", "yes", 0.0),
        ("a a a a", "a b", 2 * 0.25 * 0.5 / 0.75),
    ]
    if more := cases(seed):
        words = "abcde"
        tried += [_f1_case(more.choices(words, k=6), more.choices(words, k=4)) for _ in range(6)]
    for said, right, wanted in tried:
        given = call(answer, said, right)
        if close(given, wanted):
            continue
        a, b = Counter(said.split()), Counter(right.split())
        common = sum((a & b).values())
        shown = f"{said!r} against {right!r}: yours {given}"
        if a and close(given, common / a.total()):
            fail("this is precision alone: a one-word answer would look perfect", shown)
        if close(given, common / b.total()):
            fail("this is recall alone: a model that says everything would look perfect", shown)
        if a and common and close(given, (common / a.total() + common / b.total()) / 2):
            fail("this is the plain mean: F1 is the harmonic one", shown)
        both = len({*a} & {*b})
        if both and close(given, 2 * both / (len(a) + len(b))):
            fail("a repeated word counts once only: count how often it stands in both", shown)
        fail("2 x precision x recall / (precision + recall), over words with their counts", shown)


def _f1_case(said: list[str], right: list[str]) -> tuple[str, str, float]:
    common = sum((Counter(said) & Counter(right)).values())
    return " ".join(said), " ".join(right), 2 * common / (len(said) + len(right))
