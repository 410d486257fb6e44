"""Chat templates: a conversation as the text the model sees, with the assistant's words marked.

One template serves training and inference, so the two cannot drift. A template with Jinja's
`{% generation %}` marks says itself which characters the assistant wrote; for a tokenizer's own template
without marks they are found by rendering prefix after prefix.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.data.conversation import Message, RowError
from course_lib.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FOLDER = Path(__file__).parent / "templates"

# name -> texts that end the assistant's turn; the first is the one trained
STOP_TEXTS: dict[str, tuple[str, ...]] = {
    "smollm2": ("<|im_end|>", "<|endoftext|>"),
    "chatml": ("<|im_end|>", "<|endoftext|>"),
}
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


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


def choose_template(tokenizer: PreTrainedTokenizerBase, name: str = "auto") -> ChatTemplate:
    """Return the named template, or for `auto` the tokenizer's own, by its marked twin where there is one.

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
    if template.marked:
        return template
    for candidate in map(named_template, STOP_TEXTS):
        if _renders_alike(candidate, template, tokenizer):
            return candidate
    return template


def render(messages: Sequence[Message], template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Render a whole conversation and find the assistant's words in it.

    Raises:
        RowError: the template refuses the conversation, or the assistant's words cannot be told apart.
    """
    if not template.marked:
        return _render_by_prefixes(messages, template, tokenizer)
    text, spans = _jinja(messages, template, tokenizer, mark=True)
    turns = sum(message["role"] == "assistant" for message in messages)
    if len(spans) != turns:
        raise RowError(f"template {template.name} marks {len(spans)} answers where the conversation has {turns}")
    return Rendered(text=text, answers=tuple((start, end) for start, end in spans))


def render_prompt(messages: Sequence[Message], template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Render what the model is fed before it answers: the history and the assistant's header."""
    if not template.marked:
        history = _render_by_prefixes(messages, template, tokenizer) if messages else Rendered("", ())
        return Rendered(text=_jinja(messages, template, tokenizer, prompt=True)[0], answers=history.answers)
    text, spans = _jinja(messages, template, tokenizer, mark=True, prompt=True)
    return Rendered(text=text, answers=tuple((start, end) for start, end in spans))


def stop_token_ids(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the template's stop texts that are single tokens, and the tokenizer's EOS."""
    ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    for text in template.stop_texts:
        token = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(token) == 1:
            ids.add(token[0])
    return sorted(ids)


def _render_by_prefixes(
    messages: Sequence[Message], template: ChatTemplate, tokenizer: PreTrainedTokenizerBase
) -> Rendered:
    """Mask by prefix: what turn k adds to the text of the turns before it and the assistant's header."""
    text = _jinja(messages, template, tokenizer)[0]
    answers = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _jinja(messages[:index], template, tokenizer, prompt=True)[0]
        after = _jinja(messages[: index + 1], template, tokenizer)[0]
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


_PROBES: tuple[list[Message], ...] = (
    [{"role": "user", "content": "a"}],
    [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ],
)


def _renders_alike(candidate: ChatTemplate, own: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> bool:
    return all(
        _jinja(probe, candidate, tokenizer, prompt=True)[0] == _jinja(probe, own, tokenizer, prompt=True)[0]
        for probe in _PROBES
    )


def _jinja(
    messages: Sequence[Message],
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    *,
    mark: bool = False,
    prompt: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    variables: dict[str, Any] = {
        key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)
    }
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    try:
        texts, spans = render_jinja_template(
            conversations=[turns],
            chat_template=template.source,
            return_assistant_tokens_mask=mark,
            add_generation_prompt=prompt,
            **variables,
        )
    except TemplateError as error:
        raise RowError(f"{template.name} template refuses the conversation: {error}") from None
    return texts[0], list(spans[0]) if mark else []
