"""Chat templates: a conversation as the text the model sees, with the assistant's words marked.

One template serves training and inference, so the two cannot drift. A template with Jinja's
`{% generation %}` marks says itself which characters the assistant wrote; for a tokenizer's own template
without marks they are found by rendering prefix after prefix.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from course_lib.data.conversation import Message, RowError
from course_lib.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FOLDER = Path(__file__).parent / "templates"

_CATALOGUE: dict[str, dict[str, Any]] = yaml.safe_load((TEMPLATE_FOLDER / "templates.yaml").read_text(encoding="utf-8"))
# name -> texts that end the assistant's turn; the first is the one trained
STOP_TEXTS: dict[str, tuple[str, ...]] = {name: tuple(entry["stop"]) for name, entry in _CATALOGUE.items()}
# name -> one line on what the template is for
DESCRIPTIONS: dict[str, str] = {name: entry["about"] for name, entry in _CATALOGUE.items()}
MESSAGE_KEYS = ("role", "content", "tool_calls", "name", "tool_call_id")  # what a template sees of a message
Tools = Sequence[Mapping[str, Any]]  # OpenAI function schemas: {"type": "function", "function": {"name", ...}}
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_EITHER_MARK = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


@dataclass(frozen=True)
class ChatTemplate:
    """A named template: its Jinja source and the texts that end the assistant's turn."""

    name: str
    source: str
    stop_texts: tuple[str, ...]

    @property
    def marked(self) -> bool:
        """Whether the source carries `{% generation %}` marks."""
        return bool(_MARK.search(self.source))


@dataclass(frozen=True)
class Rendered:
    """`text` as the model sees it; `answers` are (start, end) character spans, one an assistant turn, end token included."""

    text: str
    answers: tuple[tuple[int, int], ...]


@cache
def named_template(name: str) -> ChatTemplate:
    """Read a template by its name.

    Raises:
        InputError: there is none of that name.
    """
    if name not in STOP_TEXTS:
        raise InputError(
            f"chat template {name!r} is unknown: choose auto, {', '.join(STOP_TEXTS)}{did_you_mean(name, STOP_TEXTS)}"
        )
    source = (TEMPLATE_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(name=name, source=source, stop_texts=STOP_TEXTS[name])


def without_marks(source: str) -> str:
    """The same template in plain Jinja, which other programs read: a mark becomes a condition that always holds."""
    return _EITHER_MARK.sub(lambda mark: f"{mark[1]}{'endif' if mark[2] else 'if true'}{mark[3]}", source)


def choose_template(tokenizer: PreTrainedTokenizerBase, name: str = "auto") -> ChatTemplate:
    """Return the named template, or for `auto` the tokenizer's own: as the named one that it is, or whose marked twin it is.

    A twin writes the same text as the tokenizer's own template with and without a system turn, over several turns,
    around white space, and with tools: what has a form for tools in one must have the same form in the other.

    Raises:
        InputError: the name is unknown, or the tokenizer has no template of its own.
    """
    if name != "auto":
        return named_template(name)
    own = tokenizer.chat_template
    if not isinstance(own, str) or not own:
        raise InputError(
            f"{tokenizer.name_or_path}: this tokenizer has no chat template; name one with model.template: {', '.join(STOP_TEXTS)}"
        )
    stop_texts = (tokenizer.eos_token,) if tokenizer.eos_token else ()
    template = ChatTemplate(name="the tokenizer's own", source=own, stop_texts=stop_texts)
    for candidate in map(named_template, STOP_TEXTS):
        if candidate.source == own or (not template.marked and _renders_alike(candidate, template, tokenizer)):
            return candidate
    return template


def render(
    messages: Sequence[Message],
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    tools: Tools | None = None,
) -> Rendered:
    """Render a whole conversation and find the assistant's words in it.

    Args:
        tools: functions the assistant may call, as OpenAI function schemas.

    Raises:
        RowError: the template refuses the conversation or leaves out its tools, or the assistant's words cannot be told
            apart.
    """
    if not template.marked:
        rendered = _render_by_prefixes(messages, template, tokenizer, tools)
    else:
        text, spans = _jinja(messages, template, tokenizer, tools, mark=True)
        turns = sum(message["role"] == "assistant" for message in messages)
        if len(spans) != turns:
            raise RowError(f"template {template.name} marks {len(spans)} answers where the conversation has {turns}")
        rendered = Rendered(text=text, answers=tuple(spans))
    _check_tools_are_written(rendered.text, messages, tools, template)
    return rendered


def render_prompt(
    messages: Sequence[Message],
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    tools: Tools | None = None,
) -> Rendered:
    """Render what the model is fed before it answers: the history and the assistant's header.

    Raises:
        RowError: as for `render`.
    """
    if not template.marked:
        history = _render_by_prefixes(messages, template, tokenizer, tools) if messages else Rendered("", ())
        text, spans = _jinja(messages, template, tokenizer, tools, prompt=True)[0], list(history.answers)
    else:
        text, spans = _jinja(messages, template, tokenizer, tools, mark=True, prompt=True)
    _check_tools_are_written(text, messages, tools, template)
    return Rendered(text=text, answers=tuple(spans))


def stop_token_ids(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the template's stop texts that are single tokens, and the tokenizer's EOS."""
    ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    for text in template.stop_texts:
        token = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(token) == 1:
            ids.add(token[0])
    return sorted(ids)


def _render_by_prefixes(
    messages: Sequence[Message], template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, tools: Tools | None
) -> Rendered:
    """Mask by prefix: what turn k adds to the text of the turns before it and the assistant's header."""
    text = _jinja(messages, template, tokenizer, tools)[0]
    answers = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _jinja(messages[:index], template, tokenizer, tools, prompt=True)[0]
        after = _jinja(messages[: index + 1], template, tokenizer, tools)[0]
        if not (after.startswith(before) and text.startswith(after)):
            raise RowError(
                f"{template.name} template rewrites earlier turns, so the answer of message {index + 1} cannot be told apart; "
                "name a marked template with model.template"
            )
        end = len(after) - len(_after_end_token(after[len(before) :], tokenizer))
        answers.append((len(before), end))
    return Rendered(text=text, answers=tuple(answers))


def _after_end_token(answer: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The white space a template writes after the end token belongs to the next turn."""
    trailing = answer[len(answer.rstrip()) :]
    ended = any(answer.rstrip().endswith(token) for token in tokenizer.all_special_tokens)
    return trailing if ended else ""


def _check_tools_are_written(
    text: str, messages: Sequence[Message], tools: Tools | None, template: ChatTemplate
) -> None:
    """Raise RowError where the text lacks a tool, a call, words beside a call, or a result: many templates drop them."""
    names = Counter(tool["function"]["name"] for tool in tools or ())
    for message in messages:
        calls = message.get("tool_calls") or ()
        names.update(call["function"]["name"] for call in calls)
        content = message.get("content") or ""
        as_written = (content.strip(), json.dumps(content, ensure_ascii=False))
        if (calls or message["role"] == "tool") and not any(form in text for form in as_written):
            raise RowError(
                f"{template.name} template leaves out this text of a {message['role']} turn: {content[:60]!r}"
            )
    for name, times in names.items():
        if text.count(name) < times:
            raise RowError(
                f"{template.name} template leaves out tool or call {name!r}; name a template with tools with model.template"
            )


_A_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "d",
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]},
    },
}
_USE_OF_A_TOOL: list[dict[str, Any]] = [
    {"role": "user", "content": "a"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "probe0001", "type": "function", "function": {"name": "probe_tool", "arguments": {"key": "v"}}}
        ],
    },
    {"role": "tool", "name": "probe_tool", "tool_call_id": "probe0001", "content": "result"},
    {"role": "assistant", "content": "b"},
]


def _turns(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]


# messages, tools, whether the assistant's header follows
_PROBES: tuple[tuple[list[dict[str, Any]], list[dict[str, Any]] | None, bool], ...] = (
    (_turns("a"), None, True),
    (_turns("a", "b", "c", system="s"), None, True),
    (_turns("a", "b", "c", "d"), None, False),
    (_turns("a", "b", system=""), None, False),
    (_turns(" a\n", "\n b ", system=" s "), None, False),
    (_USE_OF_A_TOOL, [_A_TOOL], False),
    ([*_turns(system="s"), *_USE_OF_A_TOOL], [_A_TOOL], False),
    (_turns("a"), [_A_TOOL], True),
)


def _renders_alike(candidate: ChatTemplate, own: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> bool:
    return all(_outcome(candidate, tokenizer, *probe) == _outcome(own, tokenizer, *probe) for probe in _PROBES)


def extends(candidate: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a template writes whatever the tokenizer's own one writes, and may write more (a system turn, tools).

    True also where the tokenizer has none.
    """
    if not tokenizer.chat_template:
        return True
    own = ChatTemplate(name="the tokenizer's own", source=tokenizer.chat_template, stop_texts=())
    outcomes = [(_outcome(own, tokenizer, *probe), _outcome(candidate, tokenizer, *probe)) for probe in _PROBES]
    written = [(text, other) for text, other in outcomes if text is not None]
    return bool(written) and all(text == other for text, other in written)


def _outcome(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, messages: Any, tools: Tools | None, prompt: bool
) -> str | None:
    """The text of a probe, or None where the template refuses it or drops the tools."""
    try:
        text = _jinja(messages, template, tokenizer, tools, prompt=prompt)[0]
        _check_tools_are_written(text, messages, tools, template)
    except RowError:
        return None
    return text


def _jinja(
    messages: Sequence[Message],
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    tools: Tools | None = None,
    *,
    mark: bool = False,
    prompt: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    variables: dict[str, Any] = {
        key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)
    }
    turns = [{key: message[key] for key in MESSAGE_KEYS if key in message} for message in messages]
    try:
        texts, spans = render_jinja_template(
            conversations=[turns],
            tools=[dict(tool) for tool in tools] if tools else None,
            chat_template=template.source,
            return_assistant_tokens_mask=mark,
            add_generation_prompt=prompt,
            **variables,
        )
    except (TemplateError, TypeError, ValueError, LookupError) as error:  # what a template's own expressions raise
        raise RowError(f"{template.name} template refuses the conversation: {error}") from None
    return texts[0], list(spans[0]) if mark else []
