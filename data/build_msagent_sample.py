"""Build `msagent_sample.jsonl` and `msagent_test.jsonl` from `source/tool_questions.yaml`, in the form of MSAgent-Bench.

    python data/build_msagent_sample.py [OUT …]

Every result in a row is what the course's tool returned when it was called, offline, and every answer is made of it. The clock
stands at a moment of the row's own. A file whose name ends in `_test` gets the wordings and the values kept for the test. Questions are
put into the order of a hash, so that tools and languages are mixed. In the sample three of one language make a conversation: its
system turn is read once for all three. In the test each stands alone, as the first question of a chat does.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import yaml

os.environ.pop("SERPER_API_KEY", None)  # with it, search would ask the web

from course_lib.agent import tools

FOLDER = Path(__file__).parent
TARGETS = (FOLDER / "msagent_sample.jsonl", FOLDER / "msagent_test.jsonl")
SHIPPED = {tool.name: tool for tool in tools.shipped_tools()}
RULES = {
    "en": "Call a tool with JSON of api_name and parameters between <|startofthink|> and <|endofthink|>. Tools:",
    "zh": "调用工具时，在<|startofthink|>和<|endofthink|>之间写JSON，包含api_name和parameters。工具：",
}
PLUGIN_EVERY, TEXT_EVERY = 5, 8  # rows with the tools in MSAgent's other form, and with the conversation as text
ALL_EVERY, LISTED = 4, 3
QUESTIONS = {"train": 540, "test": None}  # training on about 74,000 tokens
A_ROW = {"train": 3, "test": 1}
FIRST_MOMENT = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def rows(split: str) -> list[dict[str, Any]]:
    """All rows of `train` or `test`, in the order of the file."""
    source = yaml.safe_load((FOLDER / "source" / "tool_questions.yaml").read_text(encoding="utf-8"))
    asked = {turn.question: turn for turn in _turns(source, split)}
    mixed = sorted(asked.values(), key=lambda turn: _hash(turn.question))[: QUESTIONS[split]]
    rows: list[list[_Turn]] = []
    of_language: dict[str, list[_Turn]] = {}
    for turn in mixed:
        row = of_language.setdefault(turn.language, [])
        if not row:
            rows.append(row)
        row.append(turn)
        if len(row) == A_ROW[split]:
            del of_language[turn.language]
    return [_row(split, number, row) for number, row in enumerate(rows, start=1)]


class _Turn(NamedTuple):
    """A question, and what the assistant writes, calls and results among it."""

    language: str
    question: str
    written: str


def _turns(source: dict[str, Any], split: str) -> Iterator[_Turn]:
    """Every question that the source makes, some of them twice."""
    tasks, values = source["tasks"], source["values"]
    for name, task in tasks.items():
        for language in ("en", "zh"):
            wordings = task.get(language, {}).get(split, [])
            repeats = task.get("repeats", {}).get(split, {}).get(language, 1)
            for number in range(len(wordings) * repeats):
                asked = _asked(name, task, values, language, split, number)
                yield _Turn(language, asked.question, f"{asked.call}\n{asked.answer}")
    for number, pair in enumerate(source["pairs"]):
        for language, times in source["pair_repeats"][split].items():
            if all(language in tasks[name] for name in pair):
                for again in range(times):
                    place = 100 + number + len(source["pairs"]) * again
                    yield _Turn(language, *_pair(source, pair, language, split, place))
    for language, of_language in source["plain"].items():
        for question, answer in of_language[split]:
            yield _Turn(language, question, answer)


def _pair(source: dict[str, Any], pair: Sequence[str], language: str, split: str, number: int) -> tuple[str, str]:
    """Two tasks in one question, and two calls before one answer."""
    first, second = (_asked(name, source["tasks"][name], source["values"], language, split, number) for name in pair)
    joints = source["joints"][language]
    joint = _pick(joints[split], number, "joint", *pair)
    asked = second.question if joint.endswith("} {second}") else second.inner
    question = joint.format(first=_ended(first.question, language), second=_ended(asked, language))
    answer = joints["answer"].format(first=first.answer, second=second.answer)
    return question, f"{first.call}\n{second.call}\n{answer}"


def _ended(question: str, language: str) -> str:
    return question if question[-1] in ".?!。？！" else question + {"en": ".", "zh": "。"}[language]


class _Asked(NamedTuple):
    """A task's question, the same inside a sentence, its call with its result, and the answer."""

    question: str
    inner: str
    call: str
    answer: str


def _asked(name: str, task: dict[str, Any], values: dict[str, Any], language: str, split: str, number: int) -> _Asked:
    """The `number`-th use of a task. Ends the program where a tool fails, or search does not return the fact of the answer."""
    drawn: dict[str, Any] = {}
    for keys, kind in task["values"].items():
        of_kind = values[kind].get(language, values[kind])[split]
        if kind in RANGES:
            of_kind = range(of_kind[0], of_kind[1] + 1, of_kind[2])
        value = _pick(of_kind, number, name, keys, language)
        drawn |= zip(keys.split("|"), value if isinstance(value, list) else [value], strict=True)
    if "the" in drawn:
        drawn["The"] = drawn["the"][0].upper() + drawn["the"][1:]
    form = task[language]
    wording = _pick(form[split], number, name, language)
    question, inner = (
        text.format(**drawn)
        for text in (wording, wording if wording.startswith("I ") else wording[0].lower() + wording[1:])
    )
    arguments = {key: text.format(**drawn) for key, text in form.get("arguments", task["arguments"]).items()}
    result = _result(task["tool"], arguments, moment=f"{language}{question}")
    if "fact" in drawn and drawn["fact"].removeprefix("about ") not in result:
        raise SystemExit(f"{question}: {drawn['fact']!r} is not in what search returned: {result!r}")
    if time := re.search(r"\d\d:\d\d:\d\d", result):
        drawn["time"] = time[0]
    if result.startswith("error"):
        raise SystemExit(f"{question}: {task['tool']} returned {result}")
    answer = _pick(form["answer"], number, name, "answer").format(**drawn, result=result)
    made = json.dumps({"api_name": task["tool"], "parameters": arguments}, ensure_ascii=False)
    call = f"<|startofthink|>```JSON\n{made}\n```<|endofthink|>\n<|startofexec|>```\n{result}\n```<|endofexec|>"
    return _Asked(question, inner, call, answer)


RANGES = ("count", "few", "number", "large", "percent", "amount")


def _result(name: str, arguments: dict[str, Any], *, moment: str) -> str:
    """What a tool says to these arguments; those that its schema wants as numbers become numbers."""
    for key, schema in SHIPPED[name].parameters["properties"].items():
        if schema.get("type") == "number":
            arguments[key] = json.loads(arguments[key])
    now = FIRST_MOMENT + datetime.timedelta(seconds=int(_hash(moment)[:8], 16) % (300 * 86400))

    class Still(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return now.astimezone(tz)

    tools.datetime = SimpleNamespace(datetime=Still)
    return _said(name, json.dumps(arguments), moment if name == "clock" else "")


@functools.cache
def _said(name: str, arguments: str, moment: str) -> str:
    """Each call is made once: the solver starts a process for it."""
    return tools.run_tool(SHIPPED[name], json.loads(arguments)).text


def _row(split: str, number: int, asked: Sequence[_Turn]) -> dict[str, Any]:
    wanted = {name for turn in asked for name in _listed(split, number, turn)}
    listed = [_described(tool, plugin=number % PLUGIN_EVERY == 0) for name, tool in SHIPPED.items() if name in wanted]
    numbered = "\n".join(
        f"{place}. {json.dumps(tool, ensure_ascii=False)}" for place, tool in enumerate(listed, start=1)
    )
    turns = [{"from": "system", "value": f"{RULES[asked[0].language]}\n{numbered}"}]
    for turn in asked:
        turns += [{"from": "user", "value": turn.question}, {"from": "assistant", "value": turn.written}]
    conversations = json.dumps(turns, ensure_ascii=False) if number % TEXT_EVERY == 0 else turns
    return {"id": f"course_{split}_{number}", "conversations": conversations}


def _listed(split: str, number: int, asked: _Turn) -> list[str]:
    """The tools that a row lists for a question: all of them in the test and in every fourth row; elsewhere three, so that the
    model learns to look which there are. How many there are says nothing of how many are called."""
    if split == "test" or number % ALL_EVERY == 0:
        return list(SHIPPED)
    called = {name for name in SHIPPED if f'"api_name": "{name}"' in asked.written}
    return sorted(SHIPPED, key=lambda name: (name not in called, _hash(asked.question, name)))[:LISTED]


def _described(tool: tools.AgentTool, *, plugin: bool) -> dict[str, Any]:
    """A tool as MSAgent's system turns list it: parameters as a list, `required` as text."""
    required = tool.parameters["required"]
    parameters = [
        {"name": key} | ({"required": "True"} if key in required else {}) for key in tool.parameters["properties"]
    ]
    schema = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"plugin_name": tool.name, "plugin_schema_for_model": schema} if plugin else schema


def _pick(options: Sequence[Any], number: int, *key: str) -> Any:
    """The option of the `number`-th row: all in turn, in an order of the key's own."""
    return sorted(options, key=lambda option: _hash("|".join(key), str(option)))[number % len(options)]


def _hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


if __name__ == "__main__":
    for target in [Path(name) for name in sys.argv[1:]] or TARGETS:
        lines = (
            json.dumps(row, ensure_ascii=False) + "\n"
            for row in rows("test" if target.stem.endswith("_test") else "train")
        )
        target.write_text("".join(lines), encoding="utf-8", newline="\n")
