"""A conversation with one model or several: as plain HTML, as text, and as rows to train on."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from course_lib.agent.turns import numbered
from course_lib.data.conversation import Conversation, Message, Tool

State = Literal["waiting", "writing", "done", "cut", "failed"]  # cut: stopped, or as long as an answer may be


class Step(TypedDict):
    """What an agent did before it answered: `title` says it in a few words, `text` in full."""

    title: str
    text: str


class Answer(TypedDict):
    """One side's answer. `note` says what is not as usual; `messages` is what the turn added to the history, if it did."""

    text: str
    steps: list[Step]
    state: State
    note: str
    tokens: int
    tokens_per_second: float
    messages: list[Message]


class Turn(TypedDict):
    """A question and the answers to it, one a side."""

    question: str
    answers: list[Answer]


def empty_answer() -> Answer:
    """An answer that nobody has begun to write."""
    return Answer(text="", steps=[], state="waiting", note="", tokens=0, tokens_per_second=0.0, messages=[])


def training_row(turns: Sequence[Turn], side: int, system: str, tools: Sequence[Tool] = ()) -> Conversation:
    """One side's conversation as a `messages` row; questions that it did not answer are left out.

    An answer that was cut off is marked `train: false`: trained on, it would teach the model to end in the middle of a sentence.
    """
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        answer = turn["answers"][side]
        added: list[Message] = [message.copy() for message in answer["messages"]]
        if added and answer["state"] == "cut":
            added[-1]["train"] = False
        messages += added
    return numbered({"messages": messages, "tools": list(tools)} if tools else {"messages": messages})


@dataclass(frozen=True)
class Transcript:
    """What was said so far. As the last line of a cell, it is HTML that a saved notebook keeps; `str()` of it is text."""

    sides: list[str]
    turns: list[Turn]

    def __str__(self) -> str:
        lines: list[str] = []
        for turn in self.turns:
            lines.append(f"you: {turn['question']}")
            for side, answer in zip(self.sides, turn["answers"], strict=True):
                lines += [f"{side} [{step['title']}]: {step['text']}".rstrip(": ") for step in answer["steps"]]
                note = f" [{answer['note']}]" if answer["note"] else ""
                lines.append(f"{side}: {answer['text']}{note}")
        return "\n".join(lines) or "nothing said yet"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        if not self.turns:
            return "<p><em>Chat: nothing said yet.</em> What is said is shown by <code>transcript()</code> in a later cell.</p>"
        head = "".join(f'<th scope="col" align="left">{html.escape(side)}</th>' for side in self.sides)
        body = "".join(self._turn_rows(turn) for turn in self.turns)
        return f'<div class="course-transcript">{_STYLE}\n<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'

    def _turn_rows(self, turn: Turn) -> str:
        span = len(self.sides)
        question = f'<tr><td colspan="{span}" align="left"><b>You:</b> {_lines(turn["question"])}</td></tr>'
        cells = "".join(
            f'<td width="{100 // span}%" align="left" valign="top">{_answer_html(answer)}</td>'
            for answer in turn["answers"]
        )
        return f"{question}<tr>{cells}</tr>\n"


# GitHub takes the style sheet and all classes away: bold, italics, <details> and the table must do.
_STYLE = """<style>
.course-transcript table {border-collapse: collapse; width: 100%; margin: 8px 0; font-size: 13px}
.course-transcript tbody tr:nth-child(n) {background: none}
.course-transcript.course-transcript :is(td, th) {border: 0; padding: 6px 16px 6px 0; text-align: left; vertical-align: top; white-space: normal;
 overflow-wrap: anywhere; line-height: 1.5}
.course-transcript tbody tr:nth-child(odd) td {border-top: 1px solid color-mix(in srgb, currentColor 25%, transparent)}
.course-transcript pre {white-space: pre-wrap; margin: 4px 0; font-size: 12px; background: none}
</style>"""


def _lines(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")


def _answer_html(answer: Answer) -> str:
    steps = "".join(
        f"<li>{html.escape(step['title'])}<pre>{html.escape(step['text'])}</pre></li>" for step in answer["steps"]
    )
    folded = f"<details><summary>{steps_in_words(answer['steps'])}</summary><ol>{steps}</ol></details>" if steps else ""
    note = f"<br><em>[{html.escape(answer['note'])}]</em>" if answer["note"] else ""
    return f"{folded}{_lines(answer['text'])}{note}"


def steps_in_words(steps: Sequence[Step]) -> str:
    """`3 steps`."""
    return f"{len(steps)} step{'' if len(steps) == 1 else 's'}"


def json_line(row: Conversation) -> str:
    """A row as one line of a JSON Lines file."""
    return json.dumps(row, ensure_ascii=False) + "\n"
