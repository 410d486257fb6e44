"""Answers of homework 00 to ten questions, before and after a training, and ways to find a word in them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

QUESTIONS: dict[str, tuple[list[str], list[str], list[str]]] = {  # question: words, right answers, wrong ones
    "What is the capital of France?": (["Paris"], ["It is Paris.", "PARIS!"], ["It is Lyon.", "The Parisian one."]),
    "What is 7 + 5?": (["12", "twelve"], ["7 + 5 = 12", "Twelve."], ["7 + 5 = 112", "It is 125."]),
    "How many legs has a spider?": (["8", "eight"], ["Eight legs.", "It has 8."], ["Its weight is low.", "It has 18."]),
    "What is the opposite of hot?": (["cold"], ["Cold.", "It is cold, I think."], ["A colder one.", "Warm."]),
    "Letters in the word cat?": (["3", "three"], ["Three.", "There are 3!"], ["There are 13.", "Eleven."]),
    "What do bees make?": (["honey"], ["Honey.", "They make honey."], ["They honeymoon.", "They make milk."]),
    "Which planet is nearest the sun?": (["Mercury"], ["mercury", "Mercury."], ["Mercurial Mars.", "Venus."]),
    "What is the colour of grass?": (["green"], ["Green.", "It is green."], ["Of a greenhouse.", "Blue."]),
    "How many days has a week?": (["7", "seven"], ["Seven days.", "It has 7."], ["Seventeen.", "It has 70."]),
    "What falls from clouds?": (["rain"], ["Rain.", "It is rain!"], ["A brain.", "A train."]),
}


WAYS: dict[str, Callable[[str, str], bool]] = {  # to find a word in what was said, each wrong in its own way
    "a word inside another word is counted, and one with a capital letter is missed: it is notebook 00's simple check": (
        lambda word, said: word in said
    ),
    "a word inside another word is counted: 'eight' is no answer in 'Its weight is low.'": (
        lambda word, said: word.lower() in said.lower()
    ),
    "capital letters count here, and should not: 'Eight legs.' holds 'eight'": (
        lambda word, said: bool(re.search(rf"\b{word}\b", said))
    ),
    "a word with a full stop or another mark behind it is missed": (
        lambda word, said: word.lower() in said.lower().split()
    ),
}


def measured(seed: int) -> list[dict[str, Any]]:
    """What a model said to ten questions before and after training; as many became right as wrong."""
    source = random.Random(200 + seed)
    while True:
        changed = source.randint(1, 3)
        kinds = ["lost"] * changed + ["gained"] * changed + ["right", "wrong"]
        kinds += source.choices(["right", "wrong"], k=len(QUESTIONS) - len(kinds))
        source.shuffle(kinds)
        rows = []
        for (question, (words, right, wrong)), kind in zip(QUESTIONS.items(), kinds, strict=True):
            before = source.choice(right if kind in ("lost", "right") else wrong)
            after = source.choice(right if kind in ("gained", "right") else wrong)
            rows.append({"question": question, "words": words, "before": before, "after": after})
        if len({score_of(way, rows, "before") for way in (has_word, *WAYS.values())}) == 1 + len(WAYS):
            return rows  # each way gives another score


def score_of(way: Callable[[str, str], bool], rows: list[dict[str, Any]], when: str) -> int:
    """How many of the answers `when`, before or after, hold one of their words, found in this way."""
    return sum(any(way(word, row[when]) for word in row["words"]) for row in rows)


def has_word(word: str, said: str) -> bool:
    """Whether a word stands in what was said, whatever its capital letters and what is beside it."""
    return re.search(rf"\b{word}\b", said, flags=re.IGNORECASE) is not None
