"""How good a model is on rows it was not trained on: its loss, and its own answers beside the rows'.

before = evaluate(model, tokenizer, rows, template=template, generate=20)
after = evaluate(tuned, tokenizer, rows, template=template, generate=20)
compare(before, after)                                    # comparison.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from course_lib.agent.evaluation import tool_steps
from course_lib.answer_scores import chrf, contains_any, exact_match, rouge_l
from course_lib.answer_scores import mentions as mentions
from course_lib.chat.answers import continue_in_batches
from course_lib.chat.generation import stop_ids
from course_lib.comparison import Answer, Evaluation, RowResult, ToolStep
from course_lib.comparison import compare as compare
from course_lib.data.collate import pad
from course_lib.data.conversation import Conversation, Message, RowError
from course_lib.data.dataset import fit
from course_lib.data.sources import sample_rows
from course_lib.data.tokenize import Example, encode_conversations, encode_prompt
from course_lib.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from course_lib.agent.protocol import AgentProtocol
    from course_lib.data.templates import ChatTemplate

MOST_TOKENS = 2048  # a batch, padding and all, unless one row is longer: evaluation takes no more memory than training
MOST_ROWS = 8  # a batch
GENERAL_KNOWLEDGE = "general_knowledge.jsonl"  # in data/

Progress = Callable[[str, int, int], None]  # what is done, how many rows are, of how many


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Conversation],
    *,
    template: ChatTemplate,
    protocol: AgentProtocol | None = None,
    generate: int = 0,
    max_new_tokens: int = 200,
    max_length: int = 2048,
    accepted: Sequence[Sequence[str]] | None = None,
    progress: Progress = lambda part, done, total: None,
) -> Evaluation:
    """Measure a model on conversations or plain texts: the loss of every row, and answers to some of them.

    The loss is over the tokens that training would train (every assistant turn), as in `held_out_loss`. An answer is greedy,
    given all turns before the row's last answer, which is its reference. Rows to answer are spread evenly over all that have
    one, so two models get the same ones. The model is put into evaluation mode.

    Of rows with tools, where there is a protocol, every assistant turn is asked for instead (`tool_steps`), unless `generate` is 0.

    Args:
        protocol: what writes and reads tool calls (`choose_protocol`).
        generate: how many rows to answer; 0 measures the loss alone.
        max_new_tokens: where an answer is cut. One that was cut did not stop.
        max_length: tokens of a row that are read; longer ones are cut, as in training.
        accepted: for each row the texts of which an answer must contain one to be right; else nothing is said of that.
        progress: told "loss", "answers" or "tool steps", how many are done and how many there are.

    Raises:
        InputError: no row has a trained token.
    """
    model.eval()
    dropped: dict[str, list[int]] = {}
    examples: dict[int, Example] = {}
    for number, example in enumerate(encode_conversations(rows, template, tokenizer, protocol=protocol)):
        parts = [] if isinstance(example, RowError) else fit(example, max_length=max_length, over_long="truncate")
        if parts and parts[0].trained_tokens:
            examples[number] = parts[0]
        else:
            reason = str(example) if isinstance(example, RowError) else f"nothing trained within {max_length} tokens"
            dropped.setdefault(reason, []).append(number)
    if not examples:
        raise InputError(f"none of {len(rows)} rows has anything to measure: {next(iter(dropped), 'there are none')}")
    losses = dict(zip(examples, _row_losses(model, list(examples.values()), progress), strict=True))
    with_tools = [number for number in examples if protocol and generate and rows[number].get("tools")]
    can_be_answered = [n for n in examples if n not in {*with_tools} and _last_answer(rows[n]) is not None]
    answered = _spread(can_be_answered, generate)
    answers = _answers(model, tokenizer, [rows[number] for number in answered], template, max_new_tokens, progress)
    scored = {
        number: _score(rows[number], text, tokens, stopped, accepted[number] if accepted else None)
        for number, (text, tokens, stopped) in zip(answered, answers, strict=True)
    }
    steps: dict[int, tuple[ToolStep, ...]] = {}
    if protocol and with_tools:
        taken = tool_steps(
            model,
            tokenizer,
            [rows[number] for number in with_tools],
            template=template,
            protocol=protocol,
            max_new_tokens=max_new_tokens,
            progress=lambda done, total: progress("tool steps", done, total),
        )
        steps = dict(zip(with_tools, taken, strict=True))
    results = tuple(
        RowResult(number, losses[number], example.trained_tokens, scored.get(number), steps.get(number, ()))
        for number, example in examples.items()
    )
    return Evaluation(results, dropped)


def evaluate_general_knowledge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: ChatTemplate,
    generate: bool = True,
    progress: Progress = lambda part, done, total: None,
) -> Evaluation:
    """Measure on the course's forty questions of general knowledge, English and Chinese: what a training made it forget.

    An answer is right where it contains one of the row's accepted texts.
    """
    rows = sample_rows(GENERAL_KNOWLEDGE)
    return evaluate(
        model,
        tokenizer,
        [{"messages": row["messages"]} for row in rows],
        template=template,
        generate=len(rows) if generate else 0,
        max_new_tokens=40,
        accepted=[row["accepted"] for row in rows],
        progress=progress,
    )


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, examples: Sequence[Example], *, batch_size: int = MOST_ROWS) -> float:
    """Mean cross entropy in nats over the trained tokens of `examples`: each token counts the same.

    Rows are sorted by length so that little is padded. The model is put into evaluation mode and attends as it is set to, in
    any way that takes padded rows (not `segments`); `load_model` sets SDPA.
    """
    from course_lib.training.loss import evaluated_loss, trained_tokens

    model.eval()
    total, count = 0.0, 0
    for rows in _batches(sorted(examples, key=lambda example: len(example.input_ids)), batch_size):
        batch = {name: value.to(model.device) for name, value in pad(rows, pad_token_id=0).items()}
        total += evaluated_loss(model, batch).item()
        count += trained_tokens(batch)
    return total / count


def _row_losses(model: PreTrainedModel, examples: Sequence[Example], progress: Progress) -> list[float]:
    """The sum of each example's cross entropy in nats, in the order of the examples; batches as in `held_out_loss`."""
    from course_lib.training.loss import evaluated_row_losses

    order = sorted(range(len(examples)), key=lambda place: len(examples[place].input_ids))
    losses = [0.0] * len(examples)
    done = 0
    for rows in _batches([examples[place] for place in order], MOST_ROWS):
        batch = {name: value.to(model.device) for name, value in pad(rows, pad_token_id=0).items()}
        for place, loss in zip(order[done:], evaluated_row_losses(model, batch).tolist(), strict=False):
            losses[place] = loss
        done += len(rows)
        progress("loss", done, len(examples))
    return losses


def _batches(by_length: Sequence[Example], batch_size: int) -> Iterator[Sequence[Example]]:
    """At most `batch_size` rows, and `MOST_TOKENS` tokens of their rectangle."""
    rows: list[Example] = []
    for example in by_length:
        if rows and (len(rows) == batch_size or (len(rows) + 1) * len(example.input_ids) > MOST_TOKENS):
            yield rows
            rows = []
        rows.append(example)
    if rows:
        yield rows


def _spread(numbers: Sequence[int], wanted: int) -> list[int]:
    """`wanted` of the numbers, or all, evenly spread: a file may be sorted by language or subject."""
    wanted = min(wanted, len(numbers))
    return [numbers[place * len(numbers) // wanted] for place in range(wanted)]


def _last_answer(row: Conversation) -> int | None:
    """Where the last assistant turn with words stands; None for plain text, and where it is the first turn."""
    messages = row.get("messages", [])
    places = [n for n, turn in enumerate(messages) if turn["role"] == "assistant" and turn["content"].strip()]
    return places[-1] if places and any(turn["role"] != "system" for turn in messages[: places[-1]]) else None


def _turns(row: Conversation) -> tuple[list[Message], str]:
    """The turns before the last answer, and that answer."""
    place = _last_answer(row)
    assert place is not None
    return row["messages"][:place], row["messages"][place]["content"].strip()


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Conversation],
    template: ChatTemplate,
    max_new_tokens: int,
    progress: Progress,
) -> list[tuple[str, int, bool]]:
    """For each row the answer, how many tokens it has, and whether the model ended it."""
    ends = stop_ids(model, template, tokenizer)
    prompts = [encode_prompt(_turns(row)[0], template, tokenizer, row.get("tools", [])) for row in rows]
    written = continue_in_batches(
        model,
        tokenizer,
        prompts,
        ends=ends,
        max_new_tokens=max_new_tokens,
        progress=lambda done, total: progress("answers", done, total),
    )
    answers = []
    for ids in written:
        stopped = ids[-1] in ends
        answers.append((tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids) - stopped, stopped))
    return answers


def _score(row: Conversation, text: str, tokens: int, stopped: bool, accepted: Sequence[str] | None) -> Answer:
    turns, reference = _turns(row)
    return Answer(
        question=turns[-1]["content"],
        reference=reference,
        text=text,
        tokens=tokens,
        stopped=stopped,
        rouge_l=rouge_l(text, reference),
        chrf=chrf(text, reference),
        exact=exact_match(text, reference) if accepted is None else None,
        right=contains_any(text, accepted) if accepted is not None else None,
    )
