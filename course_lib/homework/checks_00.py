"""Checks of homework 00: what goes into a model, what comes out, and what to measure before it is changed.

The tokenizer is a list of pieces, and the models are scripts: what is tested is the program around them.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

from course_lib.homework.checks import call, cases, close, fail, short
from course_lib.homework.checks_00_answers import WAYS, has_word, score_of

MARKS = ("<|im_start|>", "<|im_end|>")
PIECES = (
    *(*string.ascii_letters, *string.digits, *" \n?!.,:'<>|_"),
    *("th", "then", "the", "in", "ing", "est", "ant", "establish", "ment", "What", "The", "user", "system"),
    *(" t", " th", " then", " the", " is", " it", " capital", " of", " year", " France", " sea", " a", " an"),
    *MARKS,
)
SYSTEM = "You are a helpful assistant."
HEADER = "<|im_start|>assistant\n"
VOCABULARY = 49_152  # tokens of the model of notebook 00
Messages = list[dict[str, str]]


def decode(ids: Sequence[int]) -> str:
    """The text of ids."""
    return "".join(PIECES[one] for one in ids)


def tokens(encode: Callable[[str], Any], *, seed: int | None = None) -> None:
    """The longest piece at every place, and the same text back."""
    tried = ["the sea", "What is the capital of France?", "then  the\nYear 2024, is it?", "antiestablishment", ""]
    tried.append("<|im_start|>user\nWhat is this thing?<|im_end|>\n")
    if more := cases(seed):
        tried += ["".join(more.choices(PIECES, k=30)) for _ in range(20)]
    for text in tried:
        given = call(encode, text)
        if not isinstance(given, list) or not all(isinstance(one, int) and 0 <= one < len(PIECES) for one in given):
            fail(f"a list of ids is wanted, whole numbers from 0 to {len(PIECES) - 1}", f"{text!r} -> {short(given)}")
        _judge_ids(given, text)


def _judge_ids(given: list[int], text: str) -> None:
    pieces = [PIECES[one] for one in given]
    back, shown = "".join(pieces), f"{text!r} -> {pieces}"
    if back != text:
        if back == text.replace(" ", ""):
            fail("spaces are lost: a space is text like any other, and belongs to the piece that begins with it", shown)
        if back.lower() == text.lower():
            fail("capital letters are lost: another letter is another token", shown)
        if text.startswith(back):
            fail("the end of the text is lost", shown)
        fail("the ids decode to another text: nothing is added, and nothing lost", shown)
    at = 0
    for piece in pieces:
        longer = [one for one in PIECES if len(one) > len(piece) and text.startswith(one, at)]
        if set(longer) & set(MARKS):
            fail("a mark is cut into pieces: the model would read letters, not the beginning or end of a turn", shown)
        if longer:
            fail(f"at character {at} a longer piece fits than {piece!r}", shown)
        at += len(piece)


def prompt(write_prompt: Callable[[Messages], Any], *, seed: int | None = None) -> None:
    """The text of a whole conversation, with a system turn, open where the answer begins."""
    talk = [_said("user", "My name is Maria."), _said("assistant", "Hello!"), _said("user", "What is my name?")]
    tried = [[_said("user", "Who are you?")], talk, [_said("system", "You are a pirate."), *talk]]
    if more := cases(seed):
        own = [_said("system", f"Be {more.random()}.")] if more.random() < 0.5 else []
        tried.append([*own, *(_said(role, f" {more.random()}\n") for role in ("user", "assistant", "user"))])
    for messages in tried:
        handed = [dict(one) for one in messages]
        text = call(write_prompt, handed)
        if handed != messages:
            fail("the list that was given is changed: the next prompt would be made from something else", short(handed))
        _judge_prompt(text, messages)


def _judge_prompt(text: Any, messages: Messages) -> None:
    if not isinstance(text, str):
        fail(f"text is wanted, and your function returns {type(text).__name__}")
    shown = f"{messages} -> {text!r}"
    own = messages[0]["role"] == "system"
    systems = text.count("<|im_start|>system\n")
    if systems == 0:
        fail("there is no system turn: where the messages have none, the template writes one of its own", shown)
    if systems > 1 or (own and SYSTEM in text):
        fail("a system turn of the messages stands in place of the template's: it is not a second one", shown)
    if not text.startswith("<|im_start|>system\n"):
        fail("the system turn comes first", shown)
    if missing := [one for one in messages if one["content"] not in text]:
        left_out = f"{missing[0]['content']!r} is not in the prompt"
        if missing[0]["content"].strip() in text:
            fail("a content was changed: it is written as it is, its spaces too", shown)
        fail(f"{left_out}: the model has no memory, and is fed the whole conversation each time", shown)
    if not text.endswith(HEADER):
        fail("the text does not end where the answer begins: the model would not know that it is its turn", shown)
    if text.count("<|im_end|>") != text.count("<|im_start|>") - 1:
        fail("every turn ends with <|im_end|>, but for the one that the model is to write", shown)
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", text, flags=re.DOTALL)
    wanted = [(one["role"], one["content"]) for one in ([] if own else [_said("system", SYSTEM)]) + messages]
    if [role for role, _ in turns] != [role for role, _ in wanted]:
        fail(
            "the turns are not those of the messages: each is <|im_start|>, role, line break, content, <|im_end|>, line break",
            shown,
        )
    if turns != wanted:
        fail("a content was changed: it is written as it is", shown)
    if text != "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in wanted) + HEADER:
        fail("there is text between the turns that belongs to none", shown)


def softmax(probabilities: Callable[..., Any], *, seed: int | None = None) -> None:
    """Scores to probabilities, with a temperature; wrong ways are known by what they give."""
    tried: list[tuple[list[float], float]] = [([3.0, -1.0, 0.5], 2.0), ([2.0, 1.0, 0.0], 1.0), ([2.0, 1.0, 0.0], 0.5)]
    tried += [([1000.0, 999.0], 1.0), ([5.0, 4.0], 0.001)]
    if more := cases(seed):
        tried += [([more.uniform(-5, 9) for _ in range(6)], more.uniform(0.2, 3)) for _ in range(10)]
    for logits, temperature in tried:
        shown = f"logits {short(logits)}, temperature {temperature:g}"
        large = (
            "a power of e is larger than a computer's number holds: the exercise says what may be done to all logits"
        )
        try:
            given = probabilities(list(logits), temperature)
        except OverflowError:
            fail(large, shown)
        except Exception:
            given = call(probabilities, list(logits), temperature)  # for its diagnosis
        if given is None or not hasattr(given, "__len__") or len(given) != len(logits):
            fail("as many probabilities are wanted as there are logits, in a list", f"{shown}: yours is {short(given)}")
        values = [float(one) for one in given]
        shown += f": yours is {short([round(one, 4) for one in values])}"
        if any(math.isnan(one) for one in values):
            fail(large, shown)
        if not _same(values, _softmax(logits, 1 / temperature)):
            _judge_softmax(values, logits, temperature, shown)


def _judge_softmax(values: list[float], logits: list[float], temperature: float, shown: str) -> None:
    if _same(values, _softmax(logits, 1.0)):
        fail("the temperature changes nothing", shown)
    if _same(values, _softmax(logits, temperature)):
        fail("the temperature works the wrong way: below 1 the likely tokens get likelier", shown)
    if _same(values, [one / temperature for one in _softmax(logits, 1.0)]):
        fail(
            "the probabilities are divided by the temperature: the logits are, before they become probabilities", shown
        )
    if not close(sum(values), 1.0):
        fail(f"they add up to {sum(values):.4g}: something always comes next, so it is 1", shown)
    if min(values) < 0:
        fail("a probability is below 0: powers of e are not", shown)
    fail("each is in proportion to e to the power of logit over temperature", shown)


def greedy(decoder: Callable[..., Any], *, seed: int | None = None) -> None:
    """The loop, with models that are scripts and see all that they are fed."""
    tried = [([5, 2, 7], [3, 4, 2], 8), ([5, 7], [6, 6, 0], 8), ([4], [2], 8), ([5, 2], [3, 4, 5, 6, 7, 8], 3)]
    tried.append(([9, 2], [7, 7, 2], 3))
    if more := cases(seed):
        for _ in range(10):
            answer = [*(more.randint(3, 9) for _ in range(more.randint(0, 7))), more.choice((0, 2))]
            tried.append(([more.randint(2, 9) for _ in range(4)], answer, more.randint(1, 8)))
    for ids, answer, limit in tried:
        wanted = list(itertools.takewhile(lambda token: token not in (0, 2), answer))[:limit]
        model, handed = _Script(ids, answer), list(ids)
        shown = f"prompt {ids}, stop tokens [0, 2], limit {limit}"
        try:
            given = call(decoder, model, handed, [0, 2], limit)
        except _EndlessError:
            fail("the loop does not end: a model that chooses no stop token is stopped by the limit", shown)
        if handed != ids:
            fail("the ids that were given are changed: work on a copy, or on a list of your own", shown)
        given = [int(one) for one in given]
        shown += f": yours is {given}"
        if model.unknown is not None:
            fail(
                "the model is fed something else than the prompt and the answer so far: it has no memory of its own",
                f"{shown}; it was fed {model.unknown}",
            )
        if given[: len(ids)] == ids and given != wanted:
            fail("the prompt is in the answer: return the new tokens alone", shown)
        if given[len(wanted) : len(wanted) + 1] and given[len(wanted)] in (0, 2):
            fail("a stop token ends the answer, and is not part of it; there are two of them", shown)
        if len(given) > limit:
            fail(f"the answer has {len(given)} tokens, and {limit} are the limit", shown)
        if len(given) < len(wanted) and given == wanted[: len(given)]:
            fail("it ends too early: it goes on until a stop token is chosen, or the limit is reached", shown)
        if given != wanted:
            fail("another token than the likeliest is taken", shown)


class _EndlessError(BaseException):
    """Past `except Exception`, out of a loop that would not end."""


class _Script:
    """A model that goes on with `answer` behind `prompt`, and counts what it is fed otherwise."""

    def __init__(self, prompt: list[int], answer: list[int]) -> None:
        self.prompt, self.answer, self.asked = prompt, answer, 0
        self.unknown: list[int] | None = None

    def __call__(self, ids: Sequence[int]) -> list[float]:
        if self.asked > 50:
            raise _EndlessError
        prompt, written = list(ids[: len(self.prompt)]), list(ids[len(self.prompt) :])
        if prompt != self.prompt or len(written) != self.asked:
            self.unknown = self.unknown or list(ids)
        self.asked += 1
        # behind its script it goes on: a loop that ran over a stop token shows it
        following = self.answer[len(written)] if len(written) < len(self.answer) else 8
        return [0.55 if token == following else 0.01 if token == 1 else 0.055 for token in range(10)]

    def __repr__(self) -> str:
        return "model"


def dice(choose_token: Callable[..., Any], *, seed: int | None = None) -> None:
    """A token chosen by its probability, from a roll between 0 and 1."""
    lines: list[tuple[list[float], list[float]]] = [
        ([0.5, 0.25, 0.25], [0.0, 0.3, 0.49, 0.6, 0.74, 0.76, 0.99]),
        ([0.1, 0.6, 0.3], [0.05, 0.15, 0.69, 0.71, 0.95]),
        ([0.0, 0.5, 0.0, 0.5], [0.0, 0.49, 0.5, 0.99]),
        ([*[0.1] * 10, 0.0], [0.25, math.nextafter(1, 0)]),  # ten tenths add up to less than one
    ]
    if more := cases(seed):
        weights = [more.random() for _ in range(8)]
        lines.append(([one / sum(weights) for one in weights], [more.random() for _ in range(200)]))
    for probabilities, rolls in lines:
        for roll in rolls:
            given = call(choose_token, list(probabilities), roll)
            ends = list(itertools.accumulate(probabilities))
            last = max(token for token, one in enumerate(probabilities) if one > 0)
            wanted = next((token for token, end in enumerate(ends) if end > roll), last)
            shown = f"probabilities {short(probabilities)}, roll {roll}: yours is {short(given)}"
            if not hasattr(given, "__index__") or not 0 <= given < len(probabilities):
                fail(f"the number of a token is wanted, from 0 to {len(probabilities) - 1}", shown)
            if given == wanted:
                continue
            if probabilities[given] == 0:
                fail("a token that has probability 0 was chosen", shown)
            if given == probabilities.index(max(probabilities)):
                fail("the likeliest token is chosen whatever is rolled: that is greedy decoding", shown)
            if given == int(roll * len(probabilities)):
                fail(
                    "all tokens are equally likely here: each should be chosen as often as its probability says", shown
                )
            fail("the roll lies on another token: add the probabilities up, one by one, and see where it is", shown)


def answer_steps(seed: int) -> list[tuple[str, float]]:
    """An answer token by token, with the probability that the model gave to each."""
    source = random.Random(100 + seed)
    pieces = ["The", " capital", " of", " France", " is", " Paris", ".", "<|im_end|>"]
    return [(piece, round(source.uniform(0.15, 0.35 if place == 0 else 0.99), 2)) for place, piece in enumerate(pieces)]


def surprise(whole: Any, loss: Any, guessing: Any, steps: list[tuple[str, float]]) -> None:
    """The probability of an answer, its loss, and that of a model that knows nothing."""
    if whole is ... or loss is ... or guessing is ...:
        raise NotImplementedError
    given = [probability for _, probability in steps]
    count, product = len(given), math.prod(given)
    mean = -sum(map(math.log, given)) / count
    if not close(whole, product):
        if close(whole, math.prod(given[:-1])):
            fail("the stop token is left out: that the answer ends there is chosen, too")
        if close(whole, sum(given) / count):
            fail("this is the mean probability of a token: for the whole answer all of them must be chosen")
        if close(whole, min(given)):
            fail("this is the least likely token alone: the others must be chosen as well")
        if close(whole, sum(given)):
            fail("this is the sum: one thing and then another has the product of their probabilities", short(whole))
        fail("not the probability of the answer", f"yours is {short(whole)}")
    ways = {
        "this is the sum: the loss is the mean over the tokens, so that long answers can be compared with short ones": mean
        * count,
        "the sign is wrong: the loss is the negative logarithm, so that less is better": -mean,
        "another logarithm: the loss uses the natural one, math.log": mean / math.log(2),
        "another logarithm: the natural one is wanted, math.log": mean / math.log(10),
        "the logarithm of the mean: take the logarithm of each, then the mean": -math.log(sum(given) / count),
        "this is a mean of probabilities: take their logarithms": sum(given) / count,
        "the stop token is left out: a model is trained to end its answer, too": -sum(map(math.log, given[:-1]))
        / (count - 1),
    }
    if not close(loss, mean):
        for diagnosis, value in ways.items():
            if close(loss, value):
                fail(diagnosis, f"yours is {short(loss)}")
        fail("not the mean of the negative logarithms", f"yours is {short(loss)}")
    if not close(guessing, math.log(VOCABULARY)):
        if close(guessing, 1 / VOCABULARY):
            fail("this is the probability of each token: what is the loss where every token had it?")
        if close(guessing, -math.log(VOCABULARY)):
            fail("the sign is wrong: the loss is the negative logarithm of a probability")
        fail(
            "not the loss of a model that knows nothing: each of its tokens has the same probability",
            f"yours is {short(guessing)}",
        )


def compared(before: Any, after: Any, lost: Any, rows: list[dict[str, Any]]) -> None:
    """Two scores and what hides behind them."""
    if before is ... or after is ... or lost is ...:
        raise NotImplementedError
    if not isinstance(lost, list | tuple | set) or not all(isinstance(one, str) for one in lost):
        fail("lost is a list of questions", short(lost))
    for when, score in {"before": before, "after": after}.items():
        if close(score, score_of(has_word, rows, when)):
            continue
        for diagnosis, way in WAYS.items():
            if close(score, score_of(way, rows, when)):
                fail(diagnosis, f"the score {when} is {short(score)}")
        fail(f"the score {when} is another: count the answers that hold one of the words", f"yours is {short(score)}")
    was, now = (
        {row["question"] for row in rows if any(has_word(word, row[when]) for word in row["words"])}
        for when in ("before", "after")
    )
    if set(lost) == was - now:
        return
    if set(lost) == now - was:
        fail("these are the questions that were gained: lost ones were right before", short(sorted(lost)))
    if set(lost) == {row["question"] for row in rows} - now:
        fail("these are all that are wrong after: some were wrong before, and nothing was lost", short(sorted(lost)))
    if not lost:
        fail("two scores can be the same although the questions behind them are not: compare them one by one")
    fail("lost are the questions that were right before and are wrong after", short(sorted(lost)))


def _softmax(logits: list[float], factor: float) -> list[float]:
    powers = [math.exp((one - max(logits)) * factor) for one in logits]
    return [one / sum(powers) for one in powers]


def _same(given: list[float], wanted: list[float]) -> bool:
    return all(math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-9) for one, other in zip(given, wanted, strict=True))


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
