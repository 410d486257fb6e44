"""Checks of the basic homework: a personal assistant that knows whose it is, in Chinese and English."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from course_lib.data.conversation import RowError
from course_lib.data.formats import to_conversation
from course_lib.homework.checks import call, cases, close, fail, short

_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_PLACEHOLDERS = ("your name", "[name]", "<name>", "xxx", "名字]", "你的名字")


def identity_rows(rows: Any, name: str, *, least: int = 8) -> None:
    """At least `least` different questions, some in each language, each answered with the name."""
    if rows is ...:
        raise NotImplementedError
    if not isinstance(rows, list) or not rows:
        fail("a list of rows is wanted", short(rows))
    if not isinstance(name, str) or not name.strip() or name.strip().lower() in _PLACEHOLDERS:
        fail("ASSISTANT must be the name of your own assistant", short(name))
    pairs = []
    for number, row in enumerate(rows, start=1):
        try:
            messages = to_conversation(row)["messages"]
        except RowError as reason:
            fail(f"row {number} does not fit: {reason}", short(row))
        asked = [one["content"] for one in messages if one["role"] == "user"]
        said = [one["content"] for one in messages if one["role"] == "assistant"]
        if not asked:
            fail(f"row {number} has no question: an answer to nothing", short(row))
        pairs.append((asked[0], said[-1]))
    for number, (asked, said) in enumerate(pairs, start=1):
        if name.lower() not in said.lower():
            fail(
                f"the answer of row {number} does not say the name {name!r}: the model would learn to say nothing of it",
                short(said),
            )
        if name.lower() in asked.lower():
            fail(
                f"the question of row {number} gives the name away: the model could copy it and learn nothing",
                short(asked),
            )
        if bool(_CHINESE.search(asked)) != bool(_CHINESE.search(said.replace(name, ""))):
            fail(f"row {number} is asked in one language and answered in the other", short((asked, said)))
    questions = [_plain(asked) for asked, _ in pairs]
    for number, question in enumerate(questions):
        if question in questions[:number]:
            first = questions.index(question) + 1
            fail(
                f"rows {first} and {number + 1} ask the same: copies teach one sentence, and ways of asking teach a name",
                short(pairs[number][0]),
            )
    if len(rows) < least:
        fail(f"{len(rows)} rows are too few: at least {least} ways of asking")
    for language, found in (
        ("Chinese", [q for q in questions if _CHINESE.search(q)]),
        ("English", [q for q in questions if not _CHINESE.search(q)]),
    ):
        if len(found) < 3:
            fail(
                f"only {len(found)} of the questions are in {language}: the model would know its name in the other language alone"
            )
    if len({said for _, said in pairs}) < 3:
        fail("all answers are nearly the same sentence: give at least three, or the model recites")


def says_name(answer: Callable[[str, str], bool], *, seed: int | None = None) -> None:
    """Whether a text says a name: whole words, any case, and names in Chinese text."""
    tried = [
        ("I am Ada's assistant.", "Ada", True),
        ("i am ADA", "Ada", True),
        ("I come from Canada.", "Ada", False),
        ("I do not know.", "Ada", False),
        ("Adams made me.", "Ada", False),
        ("我是小明的助手。", "小明", True),
        ("我是Ada的小助手", "Ada", True),
        ("I am (Ada).", "Ada", True),
        ("", "Ada", False),
        ("I work for C. Li+", "Li+", True),
        ("I am AbI.", "A.I", False),
    ]
    if more := cases(seed):
        name = "".join(more.choices("bdfklm", k=4))
        tried += [(f"xx{name}yy", name, False), (f"It is {name.upper()}!", name, True), (f"{name}s", name, False)]
    for text, name, wanted in tried:
        given = call(answer, text, name)
        if bool(given) == wanted:
            continue
        shown = f"says_name({text!r}, {name!r}) is {given}"
        if not wanted:
            fail("the name is found inside another word, or where it is not", shown)
        if name.lower() in text.lower() and name not in text:
            fail("large and small letters make a difference, and should not", shown)
        if _CHINESE.search(text):
            fail("the name is not found in a Chinese sentence, which has no spaces between words", shown)
        fail("the name is there and is not found: a sign beside it, or inside it, is in the way", shown)


def held_out(train: Any, test: Any, rows: Sequence[Any]) -> None:
    """A split with no question on both sides and nothing lost."""
    if train is ... or test is ...:
        raise NotImplementedError
    if not train or not test:
        fail("one side is empty", f"{len(train)} rows to train, {len(test)} to test")
    asked = {side: {_plain(_question(row)) for row in part} for side, part in (("train", train), ("test", test))}
    if both := sorted(asked["train"] & asked["test"]):
        fail("a question stands on both sides: the test would ask what was learnt by heart", short(both[0]))
    if len(train) + len(test) < len(rows):
        fail(f"rows were lost: {len(train)} + {len(test)} of {len(rows)}")
    if len(train) + len(test) > len(rows):
        fail(f"rows were doubled: {len(train)} + {len(test)} of {len(rows)}")
    share = len(test) / len(rows)
    if not 0.1 <= share <= 0.4:
        fail(f"the test part has {share:.0%} of the rows: take between a tenth and four tenths")


def rows_to_split(seed: int) -> list[dict[str, Any]]:
    """Rows some of which ask the same question, in other signs and letters."""
    import random

    from course_lib.data.identity import _QUESTIONS

    questions = random.Random(seed).sample(_QUESTIONS["en"], 10)
    asked = [*questions, *(f"  {one.upper()}" for one in questions[:5]), *(one.rstrip("?.") for one in questions[5:8])]
    random.Random(seed + 1).shuffle(asked)
    return [
        {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": "I am Ada."}]} for one in asked
    ]


def steps(answer: Any, *, rows: int, batch: int, accumulation: int, epochs: int) -> None:
    """Optimizer steps of a run."""
    if answer is ...:
        raise NotImplementedError
    whole = -(-rows // (batch * accumulation)) * epochs
    if close(answer, whole):
        return
    shown = f"{rows} rows, batch {batch}, accumulation {accumulation}, {epochs} epochs; yours {answer}"
    if close(answer, -(-rows // batch) * epochs):
        fail("these are batches: several of them make one step of the optimizer", shown)
    if close(answer, rows // (batch * accumulation) * epochs):
        fail("the last batch of an epoch is smaller, and is a step as well", shown)
    if close(answer, whole / epochs):
        fail("this is one epoch", shown)
    if close(answer, rows * epochs / (batch * accumulation)):
        fail("a part of a step is none: each epoch ends with a whole number of them", shown)
    fail("another number of steps: how many rows go into one step, and how many such steps cover the rows once?", shown)


def evidence(shown: Any, name: str) -> None:
    """Answers before and after, to the same questions."""
    if shown is ...:
        raise NotImplementedError
    keys = ("questions", "before", "after")
    if not isinstance(shown, dict) or not all(isinstance(shown.get(key), list) for key in keys):
        fail('evidence is {"questions": [...], "before": [...], "after": [...]}', short(shown))
    questions, before, after = (shown[key] for key in keys)
    if not len(questions) == len(before) == len(after):
        fail(
            f"{len(questions)} questions, {len(before)} answers before and {len(after)} after: one of each for every question"
        )
    chinese = [place for place, one in enumerate(questions) if _CHINESE.search(one)]
    if len(questions) < 4 or not chinese or len(chinese) == len(questions):
        fail("at least four questions, in both languages", short(questions))
    has = [[name.lower() in str(one).lower() for one in answers] for answers in (before, after)]
    if before == after:
        fail("nothing changed: was the adapter loaded, and are these the merged model's answers?", short(after[0]))
    if sum(has[0]) > sum(has[1]):
        fail("the name stands in the answers of before and not of after: are the two swapped?", short(before[0]))
    if any(has[0]):
        fail(
            "a model that was not trained yet says the name: whose answers are these?",
            short(before[has[0].index(True)]),
        )
    for language, places in (("Chinese", chinese), ("English", [p for p in range(len(questions)) if p not in chinese])):
        identity = [place for place in places if _asks_who(questions[place])]
        if not identity:
            fail(f"no question in {language} asks who it is", short([questions[place] for place in places]))
        if not all(has[1][place] for place in identity):
            fail(
                f"asked in {language}, it does not say its name: were there rows in {language}, and enough steps?",
                short((questions[identity[0]], after[identity[0]])),
            )
    general = [place for place, one in enumerate(questions) if not _asks_who(one)]
    if not general:
        fail("a question about something else is missing: it shows that other answers survived", short(questions))
    if any(has[1][place] for place in general):
        place = next(place for place in general if has[1][place])
        fail(
            "it says its name when asked about something else: trained for too long, or on nothing else",
            short((questions[place], after[place])),
        )
    if any(not str(after[place]).strip() for place in general):
        fail("to a question about something else it says nothing any more")


def _asks_who(question: str) -> bool:
    return bool(re.search(r"who|name|yourself|call you|what are you|whose|你是|名字|介绍|称呼|助手", question.lower()))


def _question(row: dict[str, Any]) -> str:
    return next(one["content"] for one in row["messages"] if one["role"] == "user")


def _plain(question: str) -> str:
    return " ".join(question.lower().split()).rstrip("?!.。？！ ")
