"""Tool calls as JSON, in the form the model's own chat template has for them.

The template renders them; here they are read. Which form a template has is found by rendering a call with it.
Sources of the forms: `course_lib/data/templates/*.jinja`, each with its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from course_lib.agent.turns import Turn, call, check_arguments, decoder, numbered
from course_lib.data.conversation import Conversation, Message, RowError, Tool, check_text, shown
from course_lib.data.templates import ChatTemplate, render
from course_lib.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class CallForm:
    """How a family writes calls: `mark` and `opening`, then one JSON object a call with `join` between them, then `after`.

    `key` is what the object calls its arguments.
    """

    mark: str
    opening: str
    join: str
    after: str
    key: str


_FORMS = (
    CallForm("<tool_call>", "\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>", "arguments"),  # Hermes, Qwen
    CallForm("<|action_start|>", "<|plugin|>\n", "", "<|action_end|>", "parameters"),  # InternLM2
    CallForm("[TOOL_CALLS]", " [", ", ", "]", "arguments"),  # Mistral
    CallForm("", "", "", "", "parameters"),  # Llama 3: the object alone
)
_PYTHON_TAG = "<|python_tag|>"  # Llama 3.1 may write it before a call
_ASKED: list[Message] = [{"role": "user", "content": "a"}]
_PROBE: dict[str, Any] = {"name": "probe_tool", "arguments": {"key": "v"}}
_PROBE_TOOL: Tool = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "d",
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}}},
    },
}


@dataclass(frozen=True)
class Native:
    """The calls of one template. `words`: it has a form for words beside a call; `several`: for several calls in one turn."""

    form: CallForm | None = None  # None: only `render`, which is the same for all templates
    words: bool = True
    several: bool = True
    strips: bool = False
    name: str = "native"

    @classmethod
    def of(cls, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> Native:
        """Find the form of a template.

        Raises:
            InputError: it has none, or one that is not JSON.
        """

        def written(content: str, times: int) -> str | None:
            calls = [{"id": f"call{n:05d}", "type": "function", "function": _PROBE} for n in range(1, times + 1)]
            asked: list[Any] = [*_ASKED, {"role": "assistant", "content": content, "tool_calls": calls}]
            try:
                rendered = render(asked, template, tokenizer, [_PROBE_TOOL])
            except RowError:
                return None
            return _without_end(rendered.text[slice(*rendered.answers[-1])], template, tokenizer)

        alone = written("", 1)
        form = next((form for form in _FORMS if alone and _read(alone, form)[1]), None)
        if form is None:
            raise InputError(
                f"{template.name} template has no form for tool calls in JSON; choose a ReAct protocol: react_en, react_zh, react_brief"
            )
        beside = written(" words ", 1)
        return cls(
            form, words=beside is not None, several=written("", 2) is not None, strips=_strips(template, tokenizer)
        )

    def render(self, row: Conversation) -> Conversation:
        """The conversation with new ids, which some templates ask for; the template writes it.

        Raises:
            RowError: calls and results do not match.
        """
        return numbered(row) if "messages" in row else row

    def read_turn(self, text: str) -> Turn:
        """What the model wrote, the token that ends the turn left off. Words before a call are its thought, those after it are left off."""
        assert self.form is not None, "a template is needed to read what a model wrote"
        try:
            words, calls = _read(text.removeprefix(_PYTHON_TAG), self.form)
        except (RowError, ValueError, RecursionError) as reason:
            example = f'{self.form.mark}{self.form.opening}{{"name": "tool", "{self.form.key}": {{"name": "value"}}}}{self.form.after}'
            return Turn(error=f"the tool call cannot be read: {reason}; write {example!r}")
        if not calls:
            answer = text.strip() if self.strips else text
            return (
                Turn(answer=answer)
                if answer.strip()
                else Turn(error="nothing was written; write a tool call or an answer")
            )
        return Turn(
            thought=words if self.words else "",
            calls=tuple(call(one["name"], one[self.form.key]) for one in calls[: None if self.several else 1]),
        )

    def so_far(self, text: str) -> tuple[str, str, bool]:
        """Of a turn still being written: no thought, for that is known only when a call follows; the words up to here, what may
        become a call held back; False."""
        assert self.form is not None, "a template is needed to read what a model wrote"
        mark = self.form.mark
        if not mark:
            may_be_call = text.lstrip().startswith(("{", _PYTHON_TAG[: len(text.lstrip())]))
            return "", "" if may_be_call else text, False
        before, found, _ = text.partition(mark)
        if not found:
            held = next((n for n in range(len(mark) - 1, 0, -1) if before.endswith(mark[:n])), 0)
            before = before[: len(before) - held]
        return "", before, False


def _read(text: str, form: CallForm) -> tuple[str, list[dict[str, Any]]]:
    """The words before the calls, and the calls as {"name", KEY}.

    Raises:
        RowError, ValueError, RecursionError: a call was begun that is no JSON of that form.
    """
    if form.mark:
        words, begun, rest = text.partition(form.mark)
        if not begun:
            return text, []
        rest = rest.lstrip().removeprefix(form.opening.strip())
    else:
        words, rest = "", text.strip()
        if not re.match(r'\{\s*"(name|parameters|arguments)"\s*:', rest):
            return text, []
    calls = []
    while True:
        value, end = decoder().raw_decode(rest.lstrip())
        rest = rest.lstrip()[end:].lstrip()
        if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"].strip():
            raise RowError(f"it is not an object with name and {form.key}: {shown(value)}")
        check_text(value["name"], "the name")
        other = "parameters" if form.key == "arguments" else "arguments"
        arguments = value.get(form.key, value.get(other))
        if isinstance(arguments, str):  # OpenAI's own form is JSON text
            arguments = decoder().decode(arguments)
        calls.append({"name": value["name"], form.key: check_arguments(arguments)})
        following = form.join.strip()
        if not following or not rest.startswith(following):
            break
        rest = rest[len(following) :]
    return words.removesuffix("\n") if form.mark == "<tool_call>" else words, calls


def _without_end(text: str, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> str:
    for end in filter(None, (*template.stop_texts, tokenizer.eos_token)):
        text = text.removesuffix(end)
    return text


def _strips(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template itself strips an answer, or writes a space before it that is none of its words."""
    spaced: list[Message] = [*_ASKED, {"role": "assistant", "content": "b"}]
    rendered = render(spaced, template, tokenizer)
    padded = render([*_ASKED, {"role": "assistant", "content": " b "}], template, tokenizer)
    return (
        rendered.text == padded.text
        or _without_end(rendered.text[slice(*rendered.answers[-1])], template, tokenizer) != "b"
    )
