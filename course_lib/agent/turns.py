"""What a model wrote in one turn, read: a thought, calls of tools, or an answer; and whether a call fits its tool's schema."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from course_lib.data.conversation import (
    Conversation,
    Message,
    RowError,
    Tool,
    ToolCall,
    check_json,
    json_type,
    shown,
)
from course_lib.errors import did_you_mean

LONGEST_ARGUMENTS = 100_000  # characters of JSON: far more than a context holds


@dataclass(frozen=True)
class Turn:
    """One assistant turn. It has calls, or an answer, or an `error`: a sentence for the model, of what it wrote wrongly."""

    thought: str = ""
    calls: tuple[ToolCall, ...] = ()
    answer: str | None = None
    error: str = ""

    def message(self) -> Message:
        """The turn as a message. Beside calls the thought is its content; before an answer it is `reasoning_content`.

        Raises:
            ValueError: the turn is an error; what the model wrote is then kept as it is (`malformed`).
        """
        if self.error:
            raise ValueError(f"a turn that could not be read has no message: {self.error}")
        if self.calls:
            return {"role": "assistant", "content": self.thought, "tool_calls": list(self.calls)}
        message: Message = {"role": "assistant", "content": self.answer or ""}
        return {**message, "reasoning_content": self.thought} if self.thought else message


def turn_of(message: Message) -> Turn:
    """The turn that a message of the assistant is; the inverse of `Turn.message`."""
    if calls := message.get("tool_calls"):
        return Turn(thought=message["content"], calls=tuple(calls))
    return Turn(thought=message.get("reasoning_content", ""), answer=message["content"])


def malformed(text: str) -> Message:
    """The message of a turn that could not be read: as it was written, never trained. A `tool` turn with the error follows."""
    return {"role": "assistant", "content": text, "train": False}


def is_malformed(messages: Sequence[Message], index: int) -> bool:
    """Whether the turn at `index` is one that could not be read: a result follows, and there was no call."""
    message, after = messages[index], messages[index + 1 : index + 2]
    return (
        message["role"] == "assistant" and not message.get("tool_calls") and bool(after) and after[0]["role"] == "tool"
    )


def call(name: str, arguments: Mapping[str, Any]) -> ToolCall:
    """A call in OpenAI's form, without an id."""
    return {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def write_arguments(arguments: Mapping[str, Any]) -> str:
    """Arguments as JSON on one line, the one way they are written: in training, and back to the model.

    Raises:
        RowError: a number that JSON has no form for (NaN, infinity).
    """
    try:
        return json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise RowError(f"arguments {shown(arguments)} cannot be written as JSON: {error}") from None


def read_arguments(text: str) -> dict[str, Any]:
    """Arguments out of what a model wrote: a JSON object, in a code fence or not.

    Raises:
        RowError: no JSON, something else than an object, or too long or too deep; the message is for the model.
    """
    text = text.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        text = text[text.index("\n") : -3].strip()
    if len(text) > LONGEST_ARGUMENTS:
        raise RowError(f"the arguments are {len(text)} characters long; the limit is {LONGEST_ARGUMENTS}")
    return check_arguments(_read_json(text))


def check_arguments(value: Any) -> dict[str, Any]:
    """Return `value` if it is an object of JSON with valid Unicode in it, no deeper than a conversation's may be.

    Raises:
        RowError: it is not; the message is for the model.
    """
    if not isinstance(value, dict):
        raise RowError(f'the arguments are {json_type(value)}, not a JSON object such as {{"name": "value"}}')
    check_json(value, "the arguments")
    return value


def _read_json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise RowError(
            f"the arguments are not JSON: {error.msg} at character {error.pos + 1} of {shown(text)}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        raise RowError(f"the arguments cannot be read: {error}") from None


def decoder() -> json.JSONDecoder:
    """A decoder of strict JSON: without NaN and infinities, and without numbers that would become one."""
    return json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


_MORE_NAMES = {
    "additionalProperties",
    "patternProperties",
    "allOf",
    "anyOf",
    "oneOf",
    "$ref",
}  # may allow what is not listed


def what_is_wrong(one: ToolCall, tools: Sequence[Tool]) -> str:
    """Say why a call does not fit its tool's schema, in a sentence for the model; "" where it fits.

    Parameters are checked as JSON Schema 2020-12 (https://json-schema.org/draft/2020-12); nothing is fetched for a `$ref`.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError, best_match
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    name, arguments = one["function"]["name"], one["function"]["arguments"]
    schemas = {tool["function"]["name"]: tool["function"] for tool in tools}
    if name not in schemas:
        known = ", ".join(schemas) or "none"
        return f"there is no tool {shown(name)}; the tools are: {known}{did_you_mean(name, schemas)}"
    parameters = schemas[name].get("parameters") or {}
    try:
        Draft202012Validator.check_schema(parameters)
        wrong = best_match(Draft202012Validator(parameters, registry=Registry()).iter_errors(arguments))
    except (SchemaError, Unresolvable, RecursionError) as error:
        return f"the schema of {name} is itself wrong: {' '.join(str(error).split())[:200]}"
    listed = "properties" in parameters and not _MORE_NAMES & {*parameters}
    unknown = sorted({*arguments} - {*parameters["properties"]}) if listed else []
    if wrong is not None:
        where = "".join(f".{part}" if isinstance(part, str) else f"[{part}]" for part in wrong.path).lstrip(".")
        message = f"{where}: {wrong.message}" if where else wrong.message
    elif unknown:  # JSON Schema lets them pass, and a misspelt argument would be left out unseen
        message = f"unknown argument {shown(unknown[0])}{did_you_mean(unknown[0], parameters['properties'])}"
    else:
        return ""
    expected = write_arguments({key: _type_of(schema) for key, schema in parameters.get("properties", {}).items()})
    return f"the arguments of {name} do not fit: {_shortened(message)}; expected {expected[:300]}"


def _shortened(text: str) -> str:
    """Beginning and end: jsonschema writes the value first, however long, and then what is wrong with it."""
    return text if len(text) <= 240 else f"{text[:120]} … {text[-120:]}"


def _type_of(schema: Any) -> str:
    kind = schema.get("type", "any") if isinstance(schema, Mapping) else "any"
    return kind if isinstance(kind, str) else "any"


def numbered(row: Conversation) -> Conversation:
    """The conversation with every call and its result under one id (`call00001` …), the results in the order of their calls.

    The ids are new ones: nine letters and digits, which Mistral's template asks for. Results get the name of their tool.

    Raises:
        RowError: a turn's calls and results are not equally many, or a result answers no turn of the assistant.
    """
    messages, out, index, number = row["messages"], [], 0, 0
    while index < len(messages):
        message = messages[index]
        if message["role"] == "tool":
            raise RowError(f"message {index + 1}: a tool turn that follows no turn of the assistant")
        calls = message.get("tool_calls") or []
        end = index + 1
        while end < len(messages) and messages[end]["role"] == "tool" and message["role"] == "assistant":
            end += 1
        results = _in_order(calls, messages[index + 1 : end])
        unanswered = bool(calls) and not results and end == len(messages)  # a row may end with its calls
        if not unanswered and len(results) != (
            len(calls) or min(len(results), 1)
        ):  # one result may answer a malformed call
            raise RowError(f"message {index + 1}: {len(calls)} tool calls and {len(results)} results")
        ids = [f"call{number + place:05d}" for place in range(1, max(len(calls), len(results)) + 1)]
        number += len(ids)
        if calls:
            calls = [
                {"id": key, "type": one["type"], "function": one["function"]}
                for key, one in zip(ids, calls, strict=True)
            ]
            message = {**message, "tool_calls": calls}
        out.append(message)
        for place, result in enumerate(results):
            named: Message = {**result, "tool_call_id": ids[place]}
            out.append({**named, "name": calls[place]["function"]["name"]} if calls else named)
        index = end
    return {**row, "messages": out}


def _in_order(calls: Sequence[ToolCall], results: Sequence[Message]) -> list[Message]:
    """Results in the order of their calls where ids say which belongs to which, else as they stand."""
    by_id = {result.get("tool_call_id"): result for result in results}
    ids = [one.get("id") for one in calls]
    if len(by_id) == len(results) == len(ids) and None not in ids and {*ids} == {*by_id}:
        return [by_id[key] for key in ids]
    return list(results)
