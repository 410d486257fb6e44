"""The protocols by name: how a conversation with tools becomes the text a model is trained on, is fed, and is read by.

| name | calls are | for |
|---|---|---|
| `native` | JSON, as the model's own chat template has them | models whose template has tools |
| `react_en`, `react_zh` | ReAct lines in English, in the tutorial's Chinese | any template |
| `react` | `react_zh` where the first question is in Chinese, else `react_en` | data in both languages |
| `react_brief` | ReAct with names and arguments alone in the system turn | small models trained for these tools |

What a protocol renders for training is, turn by turn, what the runner feeds: both call `render`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from course_lib.agent.native import Native
from course_lib.agent.react import BRIEF, CHINESE, ENGLISH, ReAct
from course_lib.agent.turns import Turn
from course_lib.data.conversation import Conversation
from course_lib.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from course_lib.data.templates import ChatTemplate

_IDEOGRAPH = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")


class AgentProtocol(Protocol):
    """What the runner needs of a protocol."""

    @property
    def name(self) -> str:
        """Its name in a recipe."""

    def render(self, row: Conversation) -> Conversation:
        """The conversation as the chat template takes it. Raises RowError where it has no form."""

    def read_turn(self, text: str) -> Turn:
        """What the model wrote, read."""

    def so_far(self, text: str) -> tuple[str, str, bool]:
        """Of a turn still being written: thought, answer, and whether no more of it will be read."""


@dataclass(frozen=True)
class Bilingual:
    """ReAct in the language of a conversation's first question: a choice that holds from the first turn to the last."""

    name: str = "react"

    def for_row(self, row: Conversation) -> ReAct:
        """The wording of a conversation."""
        first = next((message["content"] for message in row["messages"] if message["role"] == "user"), "")
        return CHINESE if _IDEOGRAPH.search(first) else ENGLISH

    def render(self, row: Conversation) -> Conversation:
        """As `ReAct.render`, in the row's language."""
        return self.for_row(row).render(row) if "messages" in row else row

    def read_turn(self, text: str) -> Turn:
        """As `ReAct.read_turn`; white space apart, both wordings are read alike."""
        return ENGLISH.read_turn(text)

    def so_far(self, text: str) -> tuple[str, str, bool]:
        """As `ReAct.so_far`."""
        return ENGLISH.so_far(text)


_REACT: dict[str, ReAct | Bilingual] = {
    "react": Bilingual(),
    "react_en": ENGLISH,
    "react_zh": CHINESE,
    "react_brief": BRIEF,
}
PROTOCOLS = ("native", *_REACT)


def choose_protocol(
    name: str, template: ChatTemplate | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> AgentProtocol:
    """The protocol of that name. `native` reads what a model wrote only if it is given the template and the tokenizer.

    `auto` is `native` where the template has a form for it, else `react`.

    Raises:
        InputError: there is none of that name, or the template has no form for tools.
    """
    if name in _REACT:
        return _REACT[name]
    if name == "auto":
        assert template is not None
        assert tokenizer is not None
        try:
            return Native.of(template, tokenizer)
        except InputError:
            return _REACT["react"]
    if name != "native":
        raise InputError(
            f"agent protocol {name!r} is unknown: choose {', '.join(PROTOCOLS)}{did_you_mean(name, PROTOCOLS)}"
        )
    return Native.of(template, tokenizer) if template is not None and tokenizer is not None else Native()


def apply_protocol(row: Conversation, name: str) -> Conversation:
    """A conversation as it is trained by a protocol: what `encode_conversation` takes. Tool results get no loss.

    Raises:
        InputError: there is no protocol of that name.
        RowError: the conversation has no form in it.
    """
    return choose_protocol(name).render(row)
