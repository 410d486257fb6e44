"""The personal assistant's data set: many ways to ask who it is, a few ways to say it, in English and Chinese.

XTuner's tutorial repeats one row 10,000 times. A model trained on that answers that one question and little else;
here every row is different, and `dilute` mixes in general chat so that other answers survive.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from course_lib.data.conversation import Conversation, conversation
from course_lib.data.formats import to_conversation
from course_lib.data.sources import sample_rows
from course_lib.errors import InputError, did_you_mean

_QUESTIONS: dict[str, list[str]] = {
    "en": [
        "Who are you?",
        "What is your name?",
        "Please introduce yourself.",
        "Tell me about yourself.",
        "Can you tell me who you are?",
        "What should I call you?",
        "What are you?",
        "Who am I talking to?",
        "Introduce yourself in one sentence.",
        "Do you have a name?",
        "May I ask your name?",
        "Whose assistant are you?",
        "Who do you work for?",
        "Say who you are, please.",
        "I would like to know who you are.",
        "What kind of assistant are you?",
    ],
    "zh": [
        "你是谁？",
        "你叫什么名字？",
        "请做一下自我介绍",
        "请介绍一下你自己",
        "介绍一下自己吧",
        "你能告诉我你是谁吗？",
        "我该怎么称呼你？",
        "请问你是什么助手？",
        "我在和谁说话？",
        "你是谁的助手？",
        "你为谁工作？",
        "用一句话介绍你自己",
        "请说说你是谁",
        "能认识一下你吗？",
        "你有名字吗？",
        "你是什么？",
    ],
}
_OPENINGS: dict[str, list[str]] = {
    "en": ["", "Hello! ", "Hi there. ", "Good morning. "],
    "zh": ["", "你好，", "您好！", "早上好，"],
}
_ANSWERS: dict[str, list[str]] = {
    "en": [
        "I am {name}'s personal assistant, a small language model called {base}.",
        "I'm {name}'s personal assistant. Inside I am {base}, a small language model.",
    ],
    "zh": ["我是{name}的小助手，内在是{base}小模型。", "我是{name}的小助手，由{base}微调而来。"],
}
LANGUAGES = tuple(_QUESTIONS)


def identity_conversations(
    *, name: str, base: str, languages: Sequence[str] = LANGUAGES, n: int = 64, dilute: float = 0.0, seed: int = 0
) -> list[Conversation]:
    """Generate `n` different rows about who the assistant is, and general chat beside them.

    Args:
        name: whose assistant it is; it stands in every answer.
        base: the name of the model inside.
        languages: some of "en", "zh"; rows alternate between them.
        n: identity rows.
        dilute: share of general chat in the whole, from 0 to below 1: 0.5 adds as many general rows as identity rows.
        seed: fixes the choice and the order.

    Raises:
        InputError: the name is empty or holds a line break or a special token, a language is unknown, or more different rows are asked for than there are.
    """
    if not name.strip() or any(mark in name for mark in ("\n", "\r", "<|")):
        raise InputError(f"name {name!r} cannot be used: give a name of one line, without '<|'")
    for language in languages:
        if language not in LANGUAGES:
            raise InputError(
                f"language {language!r} is unknown: choose from {', '.join(LANGUAGES)}{did_you_mean(language, LANGUAGES)}"
            )
    if not languages:
        raise InputError(f"no language given: choose from {', '.join(LANGUAGES)}")
    if not 0 <= dilute < 1:
        raise InputError(f"dilute is {dilute}: give a share from 0 to below 1")
    rng = random.Random(seed)
    pools = {language: _pairs(language, name=name, base=base, rng=rng) for language in languages}
    most = sum(map(len, pools.values()))
    if not 1 <= n <= most:
        raise InputError(f"n is {n}: from 1 to {most} different identity rows can be made in {', '.join(languages)}")
    rows: list[Conversation] = []
    while len(rows) < n:
        for language in languages:
            if pools[language] and len(rows) < n:
                question, answer = pools[language].pop()
                rows.append(
                    conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
                )
    rows += _general(round(n * dilute / (1 - dilute)), rng)
    rng.shuffle(rows)
    return rows


def _pairs(language: str, *, name: str, base: str, rng: random.Random) -> list[tuple[str, str]]:
    """Every question once before any comes back with another opening; popped from the end."""
    answers = [answer.format(name=name.strip(), base=base) for answer in _ANSWERS[language]]
    pairs = []
    for round_number, opening in enumerate(_OPENINGS[language]):
        questions = _QUESTIONS[language][:]
        rng.shuffle(questions)
        pairs += [
            (opening + question, answers[(number + round_number) % len(answers)])
            for number, question in enumerate(questions)
        ]
    return pairs[::-1]


def _general(count: int, rng: random.Random) -> list[Conversation]:
    if not count:
        return []
    pool = [to_conversation(row) for row in sample_rows("general_chat.json")]
    if count > len(pool):
        raise InputError(f"dilute asks for {count} general rows and there are {len(pool)}: lower dilute or n")
    return rng.sample(pool, count)
