"""Formats of a question and its answer: Alpaca, XTuner, prompt and completion, the MedQA sheet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from course_lib.data.conversation import Conversation, Message, RowError, conversation, json_type, shown
from course_lib.data.formats_chat import read_messages
from course_lib.data.formats_fields import (
    Row,
    list_field,
    note_left_out,
    optional_text_field,
    system_message,
    text_field,
)
from course_lib.data.formats_tools import tools_of_row

NON_ANSWERS = ("no answer", "no answers", "unanswerable", "n/a", "#n/a")  # compared without case


def from_alpaca(row: Row, notes: list[str]) -> Conversation:
    """Stanford Alpaca: instruction, input?, output; with `system` and `history` as LLaMA-Factory has them.

    The input, when there is one, follows the instruction after a blank line. `<noinput>` is no input and `<nooutput>` no
    output, as in the raw Alpaca data. `history` is a list of [question, answer] that come before.
    A row with `instruction_zh` in place of `instruction` is Chinese Alpaca; one with both is read in English.
    Source: https://github.com/tatsu-lab/stanford_alpaca
    """
    if "instruction" not in row:
        return from_alpaca_zh(row, notes)
    if row.get("instruction_zh"):
        notes.append("row has a Chinese text too (instruction_zh), left out: format alpaca_zh takes that one")
    return _alpaca(row, "", notes)


def from_alpaca_zh(row: Row, notes: list[str]) -> Conversation:
    """Chinese Alpaca: instruction_zh, input_zh?, output_zh, otherwise as Alpaca (silk-road/alpaca-data-gpt4-chinese)."""
    return _alpaca(row, "_zh", notes)


def _alpaca(row: Row, suffix: str, notes: list[str]) -> Conversation:
    instruction = text_field(row, f"instruction{suffix}", "row")
    extra = optional_text_field(row, f"input{suffix}", "row")
    if _is_placeholder(extra, "<noinput>"):
        notes.append("'<noinput>' read as no input")
        extra = ""
    prompt = "\n\n".join(part for part in (instruction, extra) if part.strip())
    if not prompt:
        raise RowError(f"'instruction{suffix}' and 'input{suffix}' are both blank")
    output = text_field(row, f"output{suffix}", "row")
    if _is_placeholder(output, "<nooutput>"):
        raise RowError(f"no output: 'output{suffix}' is {shown(output)}")
    messages = [*system_message(optional_text_field(row, "system", "row")), *_history(row)]
    return conversation([*messages, {"role": "user", "content": prompt}, {"role": "assistant", "content": output}])


def _is_placeholder(text: str, placeholder: str) -> bool:
    return len(text) < 40 and "".join(text.split()).strip("`").casefold() == placeholder


def _history(row: Row) -> list[Message]:
    if row.get("history") is None:
        return []
    messages: list[Message] = []
    for number, pair in enumerate(list_field(row, "history", "pairs"), start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"history {number} is not [question, answer]: {shown(pair)}")
        sides = dict(zip(("question", "answer"), pair, strict=True))
        messages.append({"role": "user", "content": text_field(sides, "question", f"history {number}")})
        messages.append({"role": "assistant", "content": text_field(sides, "answer", f"history {number}")})
    return messages


def from_xtuner(row: Row, notes: list[str]) -> Conversation:
    """XTuner: `conversation`, turns of input and output; the first turn may carry the system text.

    `output_with_loss: false` (XTuner 0.1.23) keeps a turn's output out of the loss. A later turn may repeat the system
    text, and no more: XTuner would write another one in the middle of the dialogue, which chat templates do not have.
    Source: https://github.com/InternLM/xtuner/tree/v0.1.9/docs/en/user_guides/dataset_format.md
    """
    turns = list_field(row, "conversation", "turns")
    messages: list[Message] = []
    first_system = ""
    for number, turn in enumerate(turns, start=1):
        where = f"turn {number}"
        if not isinstance(turn, Mapping):
            raise RowError(f"{where} is {json_type(turn)}, not an object with input and output: {shown(turn)}")
        system = optional_text_field(turn, "system", where)
        if not messages:
            first_system = system
            messages += system_message(system)
        elif system.strip() and system != first_system:
            raise RowError(
                f"{where}: system differs from the first turn's ({shown(system)}, not {shown(first_system)})"
            )
        messages.append({"role": "user", "content": text_field(turn, "input", where)})
        messages.append({"role": "assistant", "content": text_field(turn, "output", where), **_loss_of(turn, where)})
        if not turn["input"].strip() and EMPTY_INPUT not in notes:
            notes.append(EMPTY_INPUT)
        note_left_out(turn, ("system", "input", "output", "output_with_loss"), notes)
    return conversation(messages)


EMPTY_INPUT = 'a turn has an empty input; for continued pre-training write {"text": ...}'


def _loss_of(turn: Row, where: str) -> Any:
    with_loss = turn.get("output_with_loss", True)
    if not isinstance(with_loss, bool):
        raise RowError(f"{where}: output_with_loss is {shown(with_loss)}, not true or false")
    return {} if with_loss else {"train": False}


def from_prompt_completion(row: Row, notes: list[str]) -> Conversation:
    """Prompt and completion: both text, or both lists of messages. Only the completion is trained.

    Source: https://huggingface.co/docs/trl/dataset_formats and OpenAI's old fine-tuning files.
    """
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return conversation(
            [
                {"role": "user", "content": text_field(row, "prompt", "row")},
                {"role": "assistant", "content": text_field(row, "completion", "row")},
            ]
        )
    before = read_messages(list_field(row, "prompt", "messages, as 'completion' is"), notes)
    after = read_messages(list_field(row, "completion", "messages, as 'prompt' is"), notes, first=len(before) + 1)
    for message in before:
        if isinstance(message, dict) and message.get("role") == "assistant":
            message["train"] = False
    if not any(isinstance(message, dict) and message.get("role") == "assistant" for message in after):
        raise RowError("no output: no assistant turn in 'completion'")
    return conversation(before + after, tools=tools_of_row(row, notes))


def from_medqa(row: Row, notes: list[str]) -> Conversation:
    """A sheet's row of Question and Answer; answers that say there is none are refused, so that they are counted.

    Source: the sheet DrugQA of Ben Abacha et al. 2019, "Bridging the gap between consumers' medication questions and
    trusted answers", MEDINFO (https://github.com/abachaa/Medication_QA_MedInfo2019).
    """
    question, answer = text_field(row, "Question", "row"), text_field(row, "Answer", "row")
    if not question.strip():
        raise RowError("row has no 'Question'")
    if len(answer) < 40 and answer.strip().rstrip(".").casefold() in NON_ANSWERS:
        raise RowError(f"no answer: 'Answer' is {shown(answer)}")
    return conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
