"""Checks of homework 01: chat templates and loss masking."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from course_lib.homework.checks import call, cases, close, fail, short

START, END, SYSTEM, USER, ASSISTANT, BREAK = 1, 2, 3, 4, 5, 6  # the toy tokenizer; words are numbers from 10 up
IGNORE = -100
Messages = list[dict[str, str]]


def template(write_chat: Callable[..., str], *, seed: int | None = None) -> None:
    """ChatML, told by reading the text back."""
    tried: list[Messages] = [
        [_said("user", "2 + 3?")],
        [_said("user", "2 + 3?"), _said("assistant", "5")],
        [_said("system", "Be brief."), _said("user", "Two\nlines?"), _said("assistant", "Yes."), _said("user", "And?")],
    ]
    if more := cases(seed):
        tried += [[_said(more.choice(("user", "assistant")), f" {more.random()}") for _ in range(5)]]
    for messages in tried:
        for prompt in (False, True):
            text = call(write_chat, [dict(one) for one in messages], add_generation_prompt=prompt)
            _read_back(text, messages, prompt)


def _read_back(text: Any, messages: Messages, prompt: bool) -> None:
    if not isinstance(text, str):
        fail(f"text is wanted, and your function returns {type(text).__name__}")
    shown = f"{messages} -> {text!r}"
    if text.count("<|im_end|>") < len(messages):
        fail("a turn has no end: without <|im_end|> the model never learns to stop", shown)
    if text.count("<|im_end|>") > len(messages):
        fail("a turn ends that nobody has said: the header of the next answer is left open", shown)
    header = text.endswith("<|im_start|>assistant\n")
    if prompt and not header:
        fail(
            "with add_generation_prompt the text must end with the header of an assistant turn: the model would not know whose turn it is",
            shown,
        )
    if not prompt and header:
        fail("an assistant's header is written that nobody asked for: training texts would end in an open turn", shown)
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>(\n?)", text, flags=re.DOTALL)
    found = [{"role": role, "content": content} for role, content, _ in turns]
    if len(found) != len(messages):
        fail("a turn does not open with <|im_start|>, its role and a line break", shown)
    if [one["role"] for one in found] != [one["role"] for one in messages]:
        fail("the roles are not those of the messages", shown)
    if found != messages:
        fail("a content was changed: it is written as it is, its spaces too", shown)
    if any(line_break != "\n" for *_, line_break in turns):
        fail("the line break behind <|im_end|> is missing: chat would feed other tokens than training saw", shown)
    rest = re.sub(r"<\|im_start\|>\w+\n.*?<\|im_end\|>\n", "", text, flags=re.DOTALL)
    if rest not in ("", "<|im_start|>assistant\n"):
        fail("there is text between the turns that belongs to none", repr(rest))


def answered(seed: int) -> Messages:
    """A conversation whose answer is to be forged."""
    animal, sound = random.Random(seed).choice(
        [("dog", "barks"), ("cat", "purrs"), ("duck", "quacks"), ("bee", "hums")]
    )
    return [_said("user", f"Which animal {sound}?"), _said("assistant", f"A {animal}.")]


def forged(answer: Any, careless: Callable[[Messages], str], whole: Messages) -> None:
    """One message of the user that reads like a question and its answer."""
    if answer is ...:
        raise NotImplementedError
    if not isinstance(answer, list) or not all(
        isinstance(one, dict) and {"role", "content"} <= set(one) for one in answer
    ):
        fail('a list of messages is wanted, each {"role": ..., "content": ...}', short(answer))
    if len(answer) != 1 or answer[0]["role"] != "user":
        fail("a forger has the user's part alone: one message, of the user", short(answer))
    text, wanted = "".join(f"{one['role']}: {one['content']}\n" for one in answer), careless(whole)
    if text != wanted:
        at = next(
            (place for place, (a, b) in enumerate(zip(text, wanted, strict=False)) if a != b),
            min(len(text), len(wanted)),
        )
        fail(
            f"the texts part at character {at}: yours goes on {text[at : at + 12]!r}, the other {wanted[at : at + 12]!r}",
            repr(text),
        )


def labels(label: Callable[[list[int]], Any], *, seed: int | None = None) -> None:
    """Trained are the assistant's words and the ends of its turns."""
    turn = _turn
    tried = [
        [*turn(USER, [10]), *turn(ASSISTANT, [11])],
        [*turn(USER, [10, 11, 12]), *turn(ASSISTANT, [13, 14])],
        [*turn(SYSTEM, [20]), *turn(USER, [10]), *turn(ASSISTANT, [11]), *turn(USER, [12]), *turn(ASSISTANT, [13, 11])],
        [*turn(USER, [10, ASSISTANT, 11]), *turn(ASSISTANT, [12])],
        [*turn(USER, [10]), *turn(ASSISTANT, [11, 12])[:-2]],  # cut off
    ]
    if more := cases(seed):
        for _ in range(20):
            words = [[more.randint(10, 30) for _ in range(more.randint(1, 6))] for _ in range(4)]
            tried.append(
                [token for role, one in zip((USER, ASSISTANT) * 2, words, strict=True) for token in turn(role, one)]
            )
    for ids in tried:
        _judge_labels(call(label, list(ids)), ids)


def _judge_labels(given: Any, ids: list[int]) -> None:
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != len(ids):
        fail(f"labels are a list as long as the ids, {len(ids)} here", short(given))
    given = [int(one) for one in given]
    shown = f"ids {ids} -> labels {given}"
    kinds = _kinds(ids)
    trained = [one != IGNORE for one in given]
    wrong = {kind for kind, is_trained in zip(kinds, trained, strict=True) if is_trained != (kind in ("word", "end"))}
    after = [*ids[1:], None]
    if any(is_trained and one not in (token,) for is_trained, one, token in zip(trained, given, ids, strict=True)):
        if all(one in (IGNORE, following) for one, following in zip(given, after, strict=True)):
            fail("the labels are shifted by one: the loss does that itself, and twice is once too often", shown)
        fail("a label is another token's number: where a token is trained, its label is its own number", shown)
    if "end" in wrong and "word" not in wrong and wrong <= {"end"}:
        fail("the end-of-turn token is not trained: the model will not stop", shown)
    if "user" in wrong:
        fail("words of the user or the system are trained: the model would learn to ask, too", shown)
    if "user end" in wrong:
        fail("the end of a turn that is not the assistant's is trained", shown)
    if "header" in wrong:
        fail("the header of a turn is trained: the program writes it, never the model", shown)
    if "break" in wrong:
        fail("the line break behind the end is trained: chat has stopped before it", shown)
    if wrong:
        first = kinds.index("word") if "word" in kinds else -1
        later = [place for place, kind in enumerate(kinds) if kind == "word" and not trained[place]]
        if later and first not in later:
            fail(
                "an assistant turn is left out: every one is trained, not the first alone, and all of its words", shown
            )
        fail("words of the assistant are not trained", shown)


def _kinds(ids: list[int]) -> list[str]:
    kinds, role, at = [], 0, 0
    while at < len(ids):
        if ids[at] == START:
            role = ids[at + 1]
            kinds += ["header"] * 3
            at += 3
            continue
        mine = role == ASSISTANT
        if ids[at] == END:
            kinds += (["end"] if mine else ["user end"]) + ["break"] * (at + 1 < len(ids))
            at += 2
            continue
        kinds.append("word" if mine else "user")
        at += 1
    return kinds


def batch(pad_batch: Callable[..., Any], *, seed: int | None = None) -> None:
    """Padding told by length, never by id."""
    tried = [
        [([10, END], [IGNORE, END]), ([10, 11, 12, END], [IGNORE, IGNORE, 12, END])],
        [([10, 11], [IGNORE, 11])],
        [([END, 10, END], [IGNORE, 10, END]), ([11], [11])],
    ]
    if more := cases(seed):
        rows = [[more.randint(10, 20) for _ in range(more.randint(1, 9))] + [END] for _ in range(6)]
        tried.append([(ids, list(ids)) for ids in rows])
    for rows in tried:
        _judge_batch(call(pad_batch, [(list(ids), list(labels)) for ids, labels in rows], END), rows)


def _judge_batch(given: Any, rows: list[tuple[list[int], list[int]]]) -> None:
    shown = f"rows {short(rows)} -> {short(given)}"
    if not isinstance(given, tuple | list) or len(given) != 3:
        fail("three lists are wanted: ids, labels, mask", shown)
    longest = max(len(ids) for ids, _ in rows)
    for name, table in zip(("ids", "labels", "mask"), given, strict=True):
        if len(table) != len(rows) or any(len(row) != longest for row in table):
            fail(f"{name}: every row must have the length of the longest, {longest}", shown)
    for (ids, labels), padded, labelled, mask in zip(rows, *given, strict=True):
        size = len(ids)
        if list(padded[:size]) != ids:
            fail("the tokens of a row stand first, the padding behind them", shown)
        if any(one != IGNORE for one in labelled[size:]):
            fail("padding is trained: its labels must be -100", shown)
        if list(labelled[:size]) != labels:
            lost = [place for place in range(size) if labelled[place] == IGNORE != labels[place]]
            if lost and all(ids[place] == END for place in lost):
                fail(
                    "an end token is masked because it looks like padding: tell padding by length, not by its id", shown
                )
            fail("the labels of a row were changed", shown)
        if any(int(one) != 0 for one in mask[size:]):
            fail("the mask is 1 at padding: the model would read it", shown)
        if any(int(one) != 1 for one in mask[:size]):
            fail("the mask is 0 at a token of the row: tell padding by length, not by its id", shown)
        if any(one != END for one in padded[size:]):
            fail("the padding is not the pad token", shown)


def loss(answer: Callable[..., Any], *, seed: int | None = None) -> None:
    """The mean over trained tokens, shifted; wrong ways are known by what they give."""
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(1 if seed is None else seed)
    logits = torch.randn(2, 5, 7, generator=generator)
    tables = [[[IGNORE, IGNORE, 3, 4, 2], [IGNORE, 5, 2, IGNORE, IGNORE]]]
    if seed is not None:
        tables.append([[3, IGNORE, IGNORE, 6, IGNORE], [1, 2, 3, 4, IGNORE]])
    for table in tables:
        labels = torch.tensor(table)
        given = call(answer, logits.clone(), labels.clone())
        each = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        trained = labels[:, 1:] != IGNORE
        wanted = float(each.sum() / trained.sum())
        if close(given, wanted):
            continue
        aligned = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        backward = F.cross_entropy(logits[:, 1:].transpose(1, 2), labels[:, :-1], reduction="none")
        rows = [float(row.sum() / mask.sum()) for row, mask in zip(each, trained, strict=True)]
        ways = {
            "the shift is missing: the logits at a place predict the token after it": float(
                aligned.sum() / (labels != IGNORE).sum()
            ),
            "the shift goes the wrong way: the labels move left, not the logits": float(
                backward.sum() / (labels[:, :-1] != IGNORE).sum()
            ),
            "this is the sum: divide by the number of trained tokens": float(each.sum()),
            "this divides by all tokens: the masked ones do not count": float(each.mean()),
            "this divides by all tokens of the batch: the masked ones do not count": float(each.sum() / labels.numel()),
            "this is a mean of the rows' means: a token of a short row would weigh more": sum(rows) / len(rows),
            "the sign is wrong: the loss is the negative log probability": -wanted,
        }
        probability = logits[:, :-1].softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        ways["this is a mean of probabilities: take their logarithm"] = float(probability[trained].mean())
        clamped = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:].clamp(min=0), reduction="mean")
        ways["masked tokens are counted as token 0: leave out where the label is -100"] = float(clamped)
        for diagnosis, value in ways.items():
            if close(given, value):
                fail(diagnosis, f"labels {table}: yours is {float(given):.4f}")
        fail(
            "not the mean of the negative log probabilities of the trained tokens",
            f"labels {table}: yours is {float(given):.4f}",
        )


def long_rows(seed: int) -> list[tuple[int, int]]:
    """Pairs (tokens of the prompt, tokens of the answer)."""
    source = random.Random(1000 + seed)
    rows = [(source.randint(5, 180), source.randint(2, 90)) for _ in range(57)]
    return [*rows, (128, 20), (100, 28), (127, 2)]  # the edges


def cut(nothing: Any, end: Any, rows: list[tuple[int, int]], max_length: int) -> None:
    """Both counts, and the usual slips."""
    if nothing is ... or end is ...:
        raise NotImplementedError
    lost = [row for row in rows if row[0] >= max_length]
    headless = [row for row in rows if row[0] < max_length < sum(row)]
    if close(nothing, len(lost)) and close(end, len(headless)):
        return
    if close(nothing, len(headless)) and close(end, len(lost)):
        fail("the two counts are swapped")
    if close(nothing, len([row for row in rows if row[0] > max_length])):
        fail(
            "a row whose prompt has exactly as many tokens as fit has no room for an answer",
            "prompt 128, answer 20, cut at 128",
        )
    if close(end, len(headless) + len(lost)) and len(lost):
        fail("a row with nothing left to train does not train a beginning: it is in the first count alone")
    if close(end, len([row for row in rows if row[0] < max_length <= sum(row)])):
        fail("a row that fits exactly keeps its end", "prompt 100, answer 28, cut at 128")
    if close(nothing, len([row for row in rows if sum(row) > max_length])):
        fail("that counts all rows that are cut: some of them still have a beginning of an answer")
    which = "rows with nothing to train" if not close(nothing, len(lost)) else "rows without their end"
    fail(
        f"the number of {which} is another: take one row by hand, and ask which of its tokens are left",
        f"first row {rows[0]}, cut at {max_length}",
    )


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _turn(role: int, words: list[int]) -> list[int]:
    return [START, role, BREAK, *words, END, BREAK]
