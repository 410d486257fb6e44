"""Checks of homework 06: an agent, from the text of a turn to the loop around the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from course_lib.homework.checks import call, cases, fail, short

TOOLS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "upper": lambda text: text.upper(),
    "divide": lambda a, b: a / b,
}


def turn(answer: Callable[..., Any], *, seed: int | None = None) -> None:
    """A turn in ReAct as (tool, arguments), or as the final answer (text)."""
    number = seed or 7
    tried: list[tuple[str, Any]] = [
        ('Thought: I add.\nAction: add\nAction Input: {"a": 2, "b": 3}', ("add", {"a": 2, "b": 3})),
        (f'Action: upper\nAction Input: {{"text": "a: b {number}"}}', ("upper", {"text": f"a: b {number}"})),
        ("Thought: I know it.\nFinal Answer: 5", "5"),
        (f"Final Answer: It is {number}.\nIn two lines.", f"It is {number}.\nIn two lines."),
        ('Action: add\nAction Input: {"a": 1, "b": 1}\nResponse: 3\nFinal Answer: 3', ("add", {"a": 1, "b": 1})),
    ]
    for text, wanted in tried:
        given = call(answer, text)
        given = tuple(given) if isinstance(given, list) else given
        if given == wanted:
            continue
        shown = f"{text!r} -> {short(given)}"
        if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], str):
            fail("the arguments are still text: Action Input is JSON", shown)
        if "Response" in text and isinstance(given, str):
            fail(
                "the model wrote a result of its own and an answer from it, and you believed it: the first call counts, and the tool answers",
                shown,
            )
        if isinstance(wanted, str) and isinstance(given, str) and wanted.startswith(given):
            fail("the answer is cut at its first line: all behind `Final Answer:` belongs to it", shown)
        if isinstance(given, tuple) and isinstance(wanted, str):
            fail("an answer was taken for a call", shown)
        fail("not what the turn says", shown)


def result(answer: Callable[..., Any], *, seed: int | None = None) -> None:
    """A tool's result as text for the model; what goes wrong is text as well."""
    tried = [("add", {"a": 2, "b": seed or 3}, str(2 + (seed or 3))), ("upper", {"text": "hi"}, "HI")]
    for name, arguments, wanted in tried:
        given = call(answer, TOOLS, name, dict(arguments))
        if not isinstance(given, str):
            fail("a result is text: the model reads nothing else", f"{name}({arguments}) -> {short(given)}")
        if given != wanted:
            fail("the tool's result is not handed on as it is", f"{name}({arguments}) -> {given!r}")
    for name, arguments, hint in [
        ("divide", {"a": 1, "b": 0}, "zero"),
        ("add", {"a": 1}, ""),
        ("sum", {"a": 1, "b": 2}, "add"),
    ]:
        shown = f"{name}({arguments})"
        try:
            given = answer(TOOLS, name, dict(arguments))
        except NotImplementedError:
            raise
        except Exception as error:
            fail(
                f"the agent stops with {type(error).__name__}: a tool that fails, or is unknown, is told to the model, which may try again",
                shown,
            )
        if not isinstance(given, str) or not given.strip():
            fail("the model is told nothing of the error", f"{shown} -> {short(given)}")
        if hint and hint not in given:
            why = "which tools there are" if hint == "add" else "what went wrong"
            fail(f"the model is not told {why}, so it cannot do better", f"{shown} -> {given!r}")


def loop(answer: Callable[..., Any], *, seed: int | None = None) -> None:
    """Ask the model, run its call, show it the result, until it answers or its turns are over."""
    number = seed or 4
    script = [
        f'Action: add\nAction Input: {{"a": {number}, "b": 1}}',
        f'Action: add\nAction Input: {{"a": {number + 1}, "b": 1}}',
        f"Final Answer: {number + 2}",
    ]
    seen: list[list[dict[str, str]]] = []

    def model(messages: list[dict[str, str]]) -> str:
        seen.append([dict(one) for one in messages])
        if len(seen) > 20:
            fail("the model is asked more than twenty times: who ends the loop?")
        return script[min(len(seen), len(script)) - 1]

    given = call(answer, model, run_tool, "How much?", max_turns=5)
    if len(seen) < 3:
        fail("the loop ends before the model has answered", f"{len(seen)} turns -> {short(given)}")
    for turns, messages in enumerate(seen):
        results = [one for one in messages if one["content"].startswith("Response:")]
        own = [one for one in messages if one["role"] == "assistant"]
        if messages[0] != {"role": "user", "content": "How much?"}:
            fail("the question is not the first message", short(messages))
        if len(own) < turns:
            fail("the model does not see its own calls: it would make the first one for ever", short(messages))
        if len(results) < turns:
            fail(
                "the model does not see a result: each stands in a message `Response: ...` of the user", short(messages)
            )
        if any(one["role"] != "user" for one in results):
            fail("a result is put into the model's mouth: it is a turn of the user", short(messages))
        if turns and results[-1]["content"] != f"Response: {number + turns}":
            fail("the result is another than the tool's", short(results[-1]))
    if len(seen) > 3:
        fail("the model is asked again after it has answered", f"{len(seen)} turns")
    if str(given).strip() != str(number + 2):
        fail("the final answer is not what is returned", short(given))
    seen.clear()
    script[:] = script[:1]
    ended = answer(model, run_tool, "How much?", max_turns=3)
    if len(seen) > 3:
        fail(f"max_turns is 3, and the model was asked {len(seen)} times")
    if ended is not None:
        fail("a model that never answered has no answer: return None", short(ended))


def run_tool(text: str) -> tuple[str, bool]:
    """For the loop: (result, False) of a turn that calls, or (answer, True)."""
    if "Final Answer:" in text:
        return text.split("Final Answer:", 1)[1].strip(), True
    name = text.split("Action: ")[1].split("\n")[0]
    return str(TOOLS[name](**json.loads(text.split("Action Input: ")[1]))), False


def trained(answer: Callable[..., Any], *, seed: int | None = None) -> None:
    """Which turns of an agent's conversation are learnt."""
    roles = ["system", "user", "assistant", "user", "assistant", "user", "assistant"]
    texts = ["Tools: …", "2+3?", "Action: add …", "Response: 5", "Final Answer: 5", "And 1 more?", "Final Answer: 6"]
    if more := cases(seed):
        texts[1] = f"{more.random()}?"
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    given = [bool(one) for one in call(answer, [dict(one) for one in messages])]
    if len(given) != len(messages):
        fail(f"{len(messages)} values are wanted, one a message", short(given))
    if given[3]:
        fail("a tool's result is trained: the model would learn to make results up", short(messages[3]))
    for message, is_trained in zip(messages, given, strict=True):
        if is_trained == (message["role"] == "assistant"):
            continue
        if is_trained:
            fail("a turn is trained that the model never writes", short(message))
        if "Action" in message["content"]:
            fail("a call is not trained: the model would never learn to call", short(message))
        fail("an answer is not trained", short(message))
