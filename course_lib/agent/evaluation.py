"""Tool calls measured step by step: every assistant turn of a row is asked for after the turns before it.

What was called rightly stands there as the model wrote it, thought and all; else as the row has it, without the thought, which
would tell the model what to do next. So a wrong call does not spoil the steps behind it, and no step is given away. Results go
into `RowResult.steps`; `comparison.py` makes figures and intervals of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from course_lib.agent.protocol import AgentProtocol
from course_lib.agent.turns import Turn, turn_of
from course_lib.answer_scores import WordTokenizer
from course_lib.chat.answers import continue_in_batches
from course_lib.chat.generation import stop_ids
from course_lib.comparison import METRICS, Evaluation, RowResult, ToolStep, interval
from course_lib.data.conversation import CalledFunction, Conversation, Message, Tool
from course_lib.data.tokenize import encode_prompt
from course_lib.errors import InputError
from course_lib.tables import as_html, as_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from course_lib.data.templates import ChatTemplate

ALL = "all"
STEP_FIGURES = ("right_tool", "right_arguments", "answered", "grounded")
_IDEOGRAPH = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")


@dataclass
class _Asked:
    """A row while it is asked: the turns up to the next step, and the turns that are left, a step first."""

    before: list[Message]
    left: list[Message]
    tools: list[Tool]
    steps: list[ToolStep]

    def go_on(self) -> None:
        """Take turns over as they are, up to the next one that is asked for."""
        while self.left and (self.left[0]["role"] != "assistant" or not self.left[0].get("train", True)):
            self.before.append(self.left.pop(0))

    def take(self, text: str, got: Turn, *, stopped: bool) -> None:
        """Judge what the model wrote in the step, and put the turn that the next steps see into its place."""
        expected = turn_of(self.left.pop(0))
        self.steps.append(_judged(self.before, expected, text, got, stopped=stopped))
        right = not got.error and _functions(got) == _functions(expected)
        self.before.append((got if right else replace(expected, thought="")).message())
        self.go_on()


def tool_steps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Conversation],
    *,
    template: ChatTemplate,
    protocol: AgentProtocol,
    max_new_tokens: int = 100,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[ToolStep, ...]]:
    """Let a model take every assistant turn of every row, greedily; for each row its steps.

    Args:
        rows: conversations with tools. Turns with `train: False` are passed over.
        protocol: writes the prompt and reads what the model wrote.
        progress: told how many steps are done, and of how many.
    """
    asked = [_Asked([], list(row["messages"]), row["tools"], []) for row in rows]
    for row in asked:
        row.go_on()
    ends, done = stop_ids(model, template, tokenizer), 0
    total = sum(turn["role"] == "assistant" and turn.get("train", True) for row in rows for turn in row["messages"])
    while waiting := [row for row in asked if row.left]:
        prompts = []
        for row in waiting:
            written = protocol.render({"messages": row.before, "tools": row.tools})
            prompts.append(encode_prompt(written["messages"], template, tokenizer, written.get("tools", [])))
        before = done
        answers = continue_in_batches(
            model,
            tokenizer,
            prompts,
            ends=ends,
            max_new_tokens=max_new_tokens,
            progress=lambda now, _, before=before: progress(before + now, total),
        )
        done += len(waiting)
        for row, ids in zip(waiting, answers, strict=True):
            stopped = ids[-1] in ends
            text = tokenizer.decode(ids[:-1] if stopped else ids, clean_up_tokenization_spaces=False)
            row.take(text, protocol.read_turn(text), stopped=stopped)
    return [tuple(row.steps) for row in asked]


def _functions(turn: Turn) -> list[CalledFunction]:
    return [one["function"] for one in turn.calls]


def _judged(before: Sequence[Message], expected: Turn, text: str, got: Turn, *, stopped: bool) -> ToolStep:
    question = next((turn["content"] for turn in reversed(before) if turn["role"] == "user"), "")
    results = [turn["content"] for turn in before if turn["role"] == "tool"]
    right_tool = right_arguments = answered = grounded = None
    if expected.calls:
        wanted, found = _functions(expected), _functions(got)
        right_tool = [one["name"] for one in found] == [one["name"] for one in wanted]
        right_arguments = found == wanted
    else:
        answered = got.answer is not None
        if results:
            grounded = answered and is_grounded(
                got.answer or "", reference=expected.answer or "", question=question, results=results
            )
    return ToolStep(
        question=question,
        expected=_shown(expected),
        text=text,
        tool=" + ".join(one["function"]["name"] for one in expected.calls),
        stopped=stopped,
        right_tool=right_tool,
        right_arguments=right_arguments,
        answered=answered,
        grounded=grounded,
    )


def is_grounded(answer: str, *, reference: str, question: str, results: Sequence[str]) -> bool:
    """Whether an answer says what the tools returned, and nothing they did not return.

    Both must hold: every number in it stands in a result or the question; and of what the reference answer took from the results
    (its words and numbers that stand in a result and not in the question) all numbers stand in the answer, and at least half of
    the words.
    """
    said, asked = facts(answer), facts(question)
    returned = set().union(*map(facts, results))
    if not _numbers(said) <= returned | asked:
        return False
    taken = (facts(reference) & returned) - asked
    words = taken - _numbers(taken)
    return _numbers(taken) <= said and 2 * len(words & said) >= len(words)


def facts(text: str) -> set[str]:
    """Numbers as they are written, but for commas between thousands, and words in lower case; each Chinese character is a word."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    numbers = set(_NUMBER.findall(text))
    return numbers | set(WordTokenizer().tokenize(_NUMBER.sub(" ", text)))


def _numbers(found: set[str]) -> set[str]:
    return {one for one in found if one[0].isdigit()}


def _shown(turn: Turn) -> str:
    """A turn on one line, whatever the protocol."""
    if turn.calls:
        calls = [one["function"] for one in turn.calls]
        return "; ".join(f"{one['name']} {json.dumps(one['arguments'], ensure_ascii=False)}" for one in calls)
    return turn.answer or ""


@dataclass(frozen=True, repr=False)
class StepTable:
    """The steps of an evaluation by group of rows: language, calls in the row, tool; "all" with an interval."""

    groups: dict[str, Evaluation]

    def _table(self) -> list[list[str]]:
        lines = [["", *(METRICS[name].label for name in STEP_FIGURES)]]
        for title, evaluation in self.groups.items():
            lines.append([title, *(_figure(evaluation, name, with_interval=title == ALL) for name in STEP_FIGURES)])
        return lines

    def __repr__(self) -> str:
        return as_text(f"steps with tools, of {len(self.groups[ALL].rows)} rows", self._table())

    def _repr_html_(self) -> str:
        return as_html(f"steps with tools, of {len(self.groups[ALL].rows)} rows", self._table())

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Figures of each group."""
        figures = {title: evaluation.metrics() for title, evaluation in self.groups.items()}
        return {title: {name: of[name] for name in STEP_FIGURES if name in of} for title, of in figures.items()}


def step_table(evaluation: Evaluation) -> StepTable:
    """The steps of an evaluation by language and number of calls in the row, and by tool.

    Raises:
        InputError: it has no steps.
    """
    rows = [row for row in evaluation.rows if row.steps]
    if not rows:
        raise InputError("the evaluation has no steps with tools: give rows with tools, and a protocol")
    groups: dict[str, list[RowResult]] = {}
    for row in rows:
        language = "Chinese" if _IDEOGRAPH.search(row.steps[0].question) else "other languages"
        calls = sum(bool(step.tool) for step in row.steps)
        groups.setdefault(f"{language}, {calls} calls", []).append(row)
    for tool in sorted({step.tool for row in rows for step in row.steps if step.tool}):
        steps = [replace(row, steps=tuple(step for step in row.steps if step.tool == tool)) for row in rows]
        groups[tool] = [row for row in steps if row.steps]
    named = {title: Evaluation(tuple(of)) for title, of in sorted(groups.items(), key=lambda item: "," not in item[0])}
    return StepTable({ALL: Evaluation(tuple(rows)), **named})


def _figure(evaluation: Evaluation, name: str, *, with_interval: bool) -> str:
    parts = [of for row in evaluation.rows if (of := METRICS[name].parts(row))]
    if not parts:
        return "–"
    right, steps = (int(sum(column)) for column in zip(*parts, strict=True))
    text = f"{right} of {steps}, {right / steps:.0%}"
    between = interval(evaluation, name) if with_interval else None
    return text + (f" ({between[0]:.0%} to {between[1]:.0%})" if between else "")
