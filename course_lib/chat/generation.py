"""One answer: how its tokens are chosen, and its text piece by piece from a worker thread.

What is fed and what becomes of the answer is in `course_lib.chat.session`.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

from course_lib.data.templates import stop_token_ids
from course_lib.errors import InputError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

    from course_lib.data.templates import ChatTemplate

Ending = Literal["end", "length", "stop"]
REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence is decoded to


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen; temperature 0 always takes the likeliest one, and then top_p and top_k do nothing.

    Raises:
        InputError: a value is out of its range; the message names both.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    max_new_tokens: int = 512
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "seed" and value is None:
                continue
            allowed: type | tuple[type, ...] = (int, float) if field.type == "float" else int
            number = isinstance(value, allowed) and not isinstance(value, bool) and math.isfinite(value)
            in_range, wanted = _RANGES[field.name]
            if not number or not in_range(value):
                raise InputError(f"sampling: {field.name} is {value!r}; it must be {wanted}")


_RANGES: dict[str, tuple[Any, str]] = {
    "temperature": (lambda value: value >= 0, "a number from 0 (always the likeliest token) up"),
    "top_p": (lambda value: 0 < value <= 1, "a number above 0, up to 1"),
    "top_k": (lambda value: value >= 0, "a whole number from 0 (off) up"),
    "max_new_tokens": (lambda value: value >= 1, "a whole number from 1 up"),
    "repetition_penalty": (lambda value: value > 0, "a number above 0"),
    "seed": (lambda value: 0 <= value < 2**63, "a whole number from 0 up, or None"),
}


class AnswerStreamer:
    """Token ids in, pieces of text out, in the form `generate` calls a streamer.

    transformers' TextIteratorStreamer forgets all earlier tokens at a line break, and SentencePiece tokenizers then decode the
    next line without its first space: Python code arrives wrongly indented. It also holds whole words back. Here the tokens of
    the piece before are decoded along with the new ones, as vLLM and TGI do, and only incomplete characters are held back.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, hidden: Collection[int] | None = None) -> None:
        """`hidden` are the ids that are no text; by default those of all special tokens. Some templates write calls with such."""
        self.ids: list[int] = []
        self.pieces: SimpleQueue[str | None] = SimpleQueue()
        self._tokenizer, self._hidden = tokenizer, hidden
        self._prompt_seen = False
        self._context_start = 0  # the ids from here to _read_to are the piece before
        self._read_to = 0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (the first call) or new tokens, shape (1, tokens) or (tokens,)."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        self._emit(whole_characters=True)

    def end(self) -> None:
        """Pass on what was held back."""
        self._emit(whole_characters=False)

    def _emit(self, *, whole_characters: bool) -> None:
        before = self._decode(self.ids[self._context_start : self._read_to])
        text = self._decode(self.ids[self._context_start :])
        if len(text) <= len(before) or (whole_characters and text.endswith(REPLACEMENT)):
            return
        self._context_start, self._read_to = self._read_to, len(self.ids)
        self.pieces.put(text[len(before) :])

    def _decode(self, ids: list[int]) -> str:
        if self._hidden is not None:
            ids = [token for token in ids if token not in self._hidden]
        # Cleaned-up spaces would not encode to the ids that the model wrote.
        options = {"skip_special_tokens": self._hidden is None, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(ids, **options))


class Generation:
    """One answer in the making: iterate over it for its pieces; `stop` from any thread or signal handler; then `close`."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        *,
        stop_ids: Sequence[int],
        sampling: SamplingSettings,
        hidden: Collection[int] | None = None,
    ) -> None:
        """`hidden` as `AnswerStreamer` has it."""
        self.seconds = 0.0
        self._model, self._tokenizer, self._prompt = model, tokenizer, prompt
        self._stop_ids, self._sampling = stop_ids, sampling
        self._streamer = AnswerStreamer(tokenizer, hidden)
        self._stop_requested = False  # not an Event: setting one in a signal handler can deadlock on its own lock
        self._error: BaseException | None = None
        self._worker = threading.Thread(target=self._work, name="generate", daemon=True)

    def __iter__(self) -> Iterator[str]:
        """Yield the pieces of the answer.

        Raises:
            Exception: whatever the model raised.
        """
        self._worker.start()
        while (piece := self._streamer.pieces.get()) is not None:
            yield piece
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the answer at the next token."""
        self._stop_requested = True

    def close(self) -> None:
        """End the answer and wait for the worker thread, at most for one token."""
        self.stop()
        if self._worker.ident is not None:
            self._worker.join()

    @property
    def new_tokens(self) -> int:
        """How many tokens the model wrote, the one that ended the answer included."""
        return len(self._streamer.ids)

    @property
    def ending(self) -> Ending:
        """Why the answer ended: the model ended it, it reached `max_new_tokens`, or it was stopped."""
        if self._streamer.ids and self._streamer.ids[-1] in self._stop_ids:
            return "end"
        return "length" if self.new_tokens >= self._sampling.max_new_tokens else "stop"

    def _work(self) -> None:
        started = time.perf_counter()
        training = self._model.training
        try:
            if training:  # asked for a sample in the middle of a training
                self._model.eval()
            self._generate()
        except BaseException as error:
            self._error = error
        finally:
            if training:
                self._model.train()
            self.seconds = time.perf_counter() - started
            self._streamer.pieces.put(None)

    def _generate(self) -> None:
        import torch

        device, sampling = self._model.device, self._sampling
        input_ids = torch.tensor([list(self._prompt)], device=device)
        pad_token_id = self._tokenizer.pad_token_id
        if pad_token_id is None and self._stop_ids:
            pad_token_id = self._stop_ids[0]

        def stopped(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            return torch.full((len(ids),), self._stop_requested, device=ids.device)

        self._model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=sampling.max_new_tokens,
            max_length=None,  # these four: a checkpoint's own generation_config.json would bring warnings
            temperature=None,
            top_p=None,
            top_k=None,
            do_sample=False,  # logits_processors samples
            num_beams=1,
            repetition_penalty=sampling.repetition_penalty,
            logits_processor=logits_processors(sampling, device),
            use_cache=True,
            eos_token_id=list(self._stop_ids) or None,
            pad_token_id=pad_token_id,
            stopping_criteria=[stopped],
            streamer=self._streamer,
        )


def stop_ids(
    model: PreTrainedModel | PeftModel, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The template's stop tokens and the checkpoint's own: Gemma's end of turn stands only in generation_config.json."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = [own] if isinstance(own, int) else own or []
    return sorted({*stop_token_ids(template, tokenizer), *own})


def logits_processors(sampling: SamplingSettings, device: torch.device) -> LogitsProcessorList:
    """Return the steps that turn greedy decoding into sampling: temperature, top-k, top-p, then Gumbel noise; none for greedy.

    The largest of logits plus Gumbel noise is a sample of their softmax (Gumbel-max trick, Maddison et al. 2014,
    arXiv:1411.0030). The noise has a generator of its own, so a seed gives the same answer whatever other threads draw, and the
    global generators stay as they were, which `generate(do_sample=True)` cannot do.
    """
    import torch
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if sampling.temperature == 0:
        return LogitsProcessorList()
    generator = torch.Generator(device=device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)

    def add_gumbel_noise(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(scores).exponential_(generator=generator)
        return scores - noise.clamp_min(torch.finfo(scores.dtype).tiny).log()

    steps: list[Any] = [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(float(sampling.top_p)))
    return LogitsProcessorList([*steps, add_gumbel_noise])
