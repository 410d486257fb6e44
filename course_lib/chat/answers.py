"""Greedy answers to several questions at once, as text or as token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from course_lib.chat.generation import stop_ids
from course_lib.data.tokenize import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from course_lib.data.conversation import Message
    from course_lib.data.templates import ChatTemplate

# What is kept of every token while answers are written, its keys and values, grows with rows times tokens. A step of the
# answers reads every weight once, so many rows cost little more than one.
MOST_ANSWERS, MOST_KEPT_TOKENS = 32, 4096


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    template: ChatTemplate,
    system: str = "",
    max_new_tokens: int = 60,
) -> list[str]:
    """Answer each question in a conversation of its own, greedily, in one left-padded batch.

    The model must be in evaluation mode, with an attention implementation that takes a padding mask (sdpa).
    """
    answers = answer_ids(model, tokenizer, questions, template=template, system=system, max_new_tokens=max_new_tokens)
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def answer_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    template: ChatTemplate,
    system: str = "",
    max_new_tokens: int = 60,
    stop: Sequence[int] | None = None,
) -> list[list[int]]:
    """Answer as `answer_questions` does, and return the token ids of each answer.

    Args:
        stop: ids that end an answer; by default those of the template, the tokenizer and the checkpoint.

    Returns:
        For each question the ids that were written, up to and with the one that ended the answer. An answer whose last id is
        not in `stop` was cut at `max_new_tokens`.
    """
    ends = stop_ids(model, template, tokenizer) if stop is None else sorted(set(stop))
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    prompts = [
        encode_prompt([*opening, {"role": "user", "content": question}], template, tokenizer) for question in questions
    ]
    return continue_prompts(model, tokenizer, prompts, ends=ends, max_new_tokens=max_new_tokens)


def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    ends: Sequence[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Greedy continuations of tokenised prompts, in one left-padded batch; each up to and with the first id that is in `ends`."""
    import torch

    longest = max(map(len, prompts))
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    input_ids = torch.full((len(prompts), longest), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, longest - len(prompt) :] = 1
    with torch.inference_mode():
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=ends,
            pad_token_id=pad_token_id,
        )
    return [_up_to_end(written, ends) for written in output[:, longest:].tolist()]


def continue_in_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    ends: Sequence[int],
    max_new_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[int]]:
    """`continue_prompts` for any number of prompts, in batches that bound what is kept; `progress` is told prompts done and in all."""
    written: dict[int, list[int]] = {}
    for batch in _batches([len(prompt) for prompt in prompts], max_new_tokens):
        ids = continue_prompts(
            model, tokenizer, [prompts[place] for place in batch], ends=ends, max_new_tokens=max_new_tokens
        )
        written |= zip(batch, ids, strict=True)
        progress(len(written), len(prompts))
    return [written[place] for place in range(len(prompts))]


def _batches(lengths: Sequence[int], max_new_tokens: int) -> Iterator[list[int]]:
    """Places of the prompts to answer together, short ones first: at most `MOST_ANSWERS`, and `MOST_KEPT_TOKENS` of their
    rectangle with the answers, unless one alone has more."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        kept = (len(batch) + 1) * (lengths[place] + max_new_tokens)
        if batch and (len(batch) == MOST_ANSWERS or kept > MOST_KEPT_TOKENS):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _up_to_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Without the padding that follows an answer which ended before the others of its batch."""
    first = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: first + 1]
