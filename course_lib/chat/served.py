"""The model behind a server: how a request becomes a prompt, and a prompt an answer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from course_lib.agent.native import Native
from course_lib.agent.turns import numbered
from course_lib.chat.generation import Generation, SamplingSettings, stop_ids
from course_lib.chat.openai_request import ChatRequest, RequestError
from course_lib.chat.tool_calls import PlainWords, WordsAndCalls
from course_lib.data.conversation import RowError
from course_lib.data.tokenize import encode_prompt
from course_lib.errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from course_lib.data.templates import ChatTemplate

UNASKED_TOKENS = 512  # of an answer whose length the client leaves open, as in `course chat`


class Served:
    """A model, its name for clients, and how conversations become its prompts."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: ChatTemplate,
        name: str,
    ) -> None:
        self.model, self.tokenizer, self.template, self.name = model, tokenizer, template, name
        self.context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.started = int(time.time())
        self._stop_ids = stop_ids(model, template, tokenizer)
        self._native: Native | None = None  # found when the first client brings tools

    def prompt(self, asked: ChatRequest) -> tuple[list[int], SamplingSettings]:
        """Token ids to feed, and settings under which the answer fits into the context.

        Raises:
            RequestError: the template refuses the conversation or has no form for tools that can be read back, or prompt and
                answer do not fit.
        """
        if asked.tools and self._native is None:
            self._native = self._read_native()
        try:
            messages = numbered({"messages": asked.messages})["messages"]  # calls and results belong together
            ids = encode_prompt(messages, self.template, self.tokenizer, asked.tools)
        except RowError as error:
            raise RequestError(f"this conversation cannot be rendered: {error}", param="messages") from None
        room = UNASKED_TOKENS if self.context is None else self.context - len(ids)
        if room < (asked.max_tokens or 1):
            answer = f"{asked.max_tokens} tokens of answer" if asked.max_tokens else "an answer"
            raise RequestError(
                f"the prompt is too long: {len(ids)} tokens, and with {answer} it does not fit into the context of "
                f"{self.context}; shorten the messages, or lower max_tokens",
                param="messages",
                code="context_length_exceeded",
            )
        return ids, asked.settings(asked.max_tokens or min(room, UNASKED_TOKENS))

    def generation(self, asked: ChatRequest, prompt: list[int], sampling: SamplingSettings) -> Generation:
        """The answer to a prompt, not begun yet."""
        return Generation(
            self.model,
            self.tokenizer,
            prompt,
            stop_ids=self._stop_ids,
            sampling=sampling,
            stop_texts=asked.stop_texts,
            hidden=self._stop_ids if asked.tools else None,
        )

    def reader(self, asked: ChatRequest) -> PlainWords:
        """What makes words and tool calls of the pieces of an answer."""
        if not asked.tools:
            return PlainWords()
        assert self._native is not None
        return WordsAndCalls(self._native)

    def _read_native(self) -> Native:
        try:
            return Native.of(self.template, self.tokenizer)
        except InputError:
            raise RequestError(
                f"{self.template.name} template has no form for tools that can be read back; leave tools out",
                param="tools",
            ) from None
