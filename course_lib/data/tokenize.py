"""Text to token ids and labels, in training and in chat by the same two functions.

What people and tools write is text, even where it spells a special token: a user who types `<|im_end|>` must not end the
turn. Such a spelling is broken by a mark before the template is rendered, and tokenised in two pieces where the mark was.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from course_lib.data.conversation import Conversation, Message, RowError, Tool
from course_lib.data.templates import ChatTemplate, Rendered, render, render_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from course_lib.agent.protocol import AgentProtocol

TrainOn = Literal["all", "last", "marked"]

IGNORE_INDEX = -100  # the label of a token the loss does not see; PyTorch's default ignore_index
_BREAK = "\ufdd0"  # Unicode promises never to give this code point a meaning


@dataclass(frozen=True)
class Example:
    """One tokenised conversation.

    `input_ids` and `labels` have the same length; a label is the token's own id where it is trained and -100
    elsewhere. The shift by one happens in the loss.
    """

    input_ids: list[int]
    labels: list[int]

    @property
    def trained_tokens(self) -> int:
        """How many tokens the loss sees. The first token of a row is never predicted, so it does not count."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


def encode_conversation(
    row: Conversation,
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_on: TrainOn = "all",
) -> Example:
    """Tokenise a row and label what is trained.

    Of a conversation, the assistant's words and the tokens that end its turns; of plain text (`text` rows, for continued
    pre-training) every token, between the tokenizer's BOS and EOS where it has them.

    Args:
        train_on: `all` assistant turns but those with `train: False`; the `last` one alone; or `marked`, those with
            `train: True`.

    Raises:
        RowError: the template cannot render the conversation.
    """
    (example,) = encode_conversations([row], template, tokenizer, train_on=train_on)
    if isinstance(example, RowError):
        raise example
    return example


def encode_conversations(
    rows: Sequence[Conversation],
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_on: TrainOn = "all",
    protocol: AgentProtocol | None = None,
) -> list[Example | RowError]:
    """`encode_conversation` for many rows, faster: the tokenizer takes all texts at once, on all processors.

    Args:
        protocol: what writes tool calls and results before the template sees them; none leaves them to the template.

    Returns:
        For each row its example, or why it has none.
    """
    rendered: list[tuple[Conversation, Rendered] | RowError] = []
    for row in rows:
        try:
            written = protocol.render(row) if protocol else row
            rendered.append((written, _render(written, template, tokenizer)))
        except RowError as reason:
            rendered.append(reason)
    encoded = iter(_encode([one[1] for one in rendered if not isinstance(one, RowError)], tokenizer))
    return [
        one if isinstance(one, RowError) else _label(one[0], *next(encoded), tokenizer=tokenizer, train_on=train_on)
        for one in rendered
    ]


def encode_prompt(
    messages: Sequence[Message],
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Tool] = (),
) -> list[int]:
    """Token ids the model is fed before its next answer: a prefix of what training saw for the same turns."""
    broken = _broken([*messages, *tools], tokenizer)
    rendered = render_prompt(broken[: len(messages)], template, tokenizer, broken[len(messages) :] or None)
    return _encode([rendered], tokenizer)[0][0]


def _render(row: Conversation, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    if "text" in row:
        return Rendered(text=_broken([row["text"]], tokenizer)[0], answers=())
    messages = row["messages"]
    broken = _broken([*messages, *row.get("tools", [])], tokenizer)
    return render(broken[: len(messages)], template, tokenizer, broken[len(messages) :] or None)


def _label(
    row: Conversation,
    input_ids: list[int],
    answer_of: list[int | None],
    *,
    tokenizer: PreTrainedTokenizerBase,
    train_on: TrainOn,
) -> Example:
    if "text" in row:
        return _whole_text(input_ids, tokenizer)
    wanted = _wanted_answers(row["messages"], train_on)
    labels = [
        token if answer is not None and wanted[answer] else IGNORE_INDEX
        for token, answer in zip(input_ids, answer_of, strict=True)
    ]
    return Example(input_ids=input_ids, labels=labels)


def _wanted_answers(messages: Sequence[Message], train_on: TrainOn) -> list[bool]:
    answers = [message for message in messages if message["role"] == "assistant"]
    if train_on == "last":
        return [number == len(answers) and answer.get("train", True) for number, answer in enumerate(answers, start=1)]
    return [answer.get("train", train_on == "all") for answer in answers]


def _whole_text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Example:
    """BOS, text, EOS. The EOS is what teaches a model where a text ends; a tokenizer whose BOS opens chat turns does
    without one (ChatML's `<|im_start|>`)."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    opens_turns = tokenizer.bos_token in ("<|im_start|>", "<|im_end|>", tokenizer.eos_token)
    ids = ([bos] if bos is not None and not opens_turns else []) + ids + ([eos] if eos is not None else [])
    return Example(input_ids=ids, labels=list(ids))


def _encode(
    rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int | None]]]:
    """Return token ids and, for each, the number of the answer it belongs to (None for all other text)."""
    whole = [one for one in rendered if _BREAK not in one.text]
    tokens = iter(_tokens([one.text for one in whole], tokenizer))
    encoded = []
    for one in rendered:
        in_pieces = _BREAK in one.text
        if not in_pieces:
            ids, spans = next(tokens)
            answer_of = _answer_of(spans, one.answers)
            in_pieces = _edge_moves(one, ids, spans, tokenizer)
        encoded.append(_encode_in_pieces(one, tokenizer) if in_pieces or answer_of is None else (ids, answer_of))
    return encoded


def _tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Ids and the characters (start, end) each stands for. The template writes every special token itself, hence
    `add_special_tokens=False`: no second BOS."""
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # what the call below calls, without its Python work for each text: four times faster
        backend.no_truncation()
        backend.no_padding()
        return [(one.ids, one.offsets) for one in backend.encode_batch(texts, add_special_tokens=False)]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))


def _answer_of(token_spans: Sequence[tuple[int, int]], answers: Sequence[tuple[int, int]]) -> list[int | None] | None:
    """The answer each token lies in, or None for all where one token holds both prompt and answer."""
    beyond = token_spans[-1][1] + 1 if token_spans else 1
    answer_of: list[int | None] = []
    spans = iter(enumerate(answers))
    number, (start, end) = next(spans, (None, (beyond, beyond)))
    for token_start, token_end in token_spans:
        while token_start >= end:
            number, (start, end) = next(spans, (None, (beyond, beyond)))
        if token_end > start > token_start or (token_start >= start and token_end > end):
            return None
        answer_of.append(number if token_start >= start else None)
    return answer_of


def _edge_moves(
    rendered: Rendered, ids: list[int], spans: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Whether a prompt alone, as chat feeds it, ends in other tokens than with its answer behind it.

    GPT-2's rule of cutting keeps the last of several white space characters apart where a word follows, and joins them where
    none does: the header "\\n\\n" of Llama 3 is two tokens before an answer, and one at the end of a prompt. Where one token
    holds the last two characters of the header, nothing was cut.
    """
    for start, _ in rendered.answers:
        if start < 2 or not rendered.text[start - 2 : start].isspace():
            continue
        before = next((place for place, span in enumerate(spans) if span[0] >= start), len(spans))
        whole_run = spans[before - 1][0] <= start - 2
        if not whole_run and ids[:before] != _tokens([rendered.text[:start]], tokenizer)[0][0]:
            return True
    return False


def _encode_in_pieces(rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int | None]]:
    """Tokenise prompts and answers apart, as inference does, so that no token straddles the edge; and apart at each break.

    Edges matter where an answer begins with white space: "\\n" of the header and "\\n" of the answer are one token.
    """
    input_ids: list[int] = []
    answer_of: list[int | None] = []
    position = 0
    end_of_text = (None, (len(rendered.text), len(rendered.text)))
    for number, (start, end) in [*enumerate(rendered.answers), end_of_text]:
        for text, answer in ((rendered.text[position:start], None), (rendered.text[start:end], number)):
            for piece in filter(None, text.split(_BREAK)):
                ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
                input_ids += ids
                answer_of += [answer] * len(ids)
        position = end
    return input_ids, answer_of


_patterns: WeakKeyDictionary[Any, re.Pattern[str]] = WeakKeyDictionary()


def _broken(parts: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Messages or tools with a break after the first character of every spelling of a special or added token."""
    pattern = _patterns.get(tokenizer)
    if pattern is None:
        names = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True)
        # a token of one character, or of white space alone, cannot be forged: it means no more than it says
        names = [re.escape(name) for name in names if len(name) > 1 and name.strip()]
        pattern = _patterns[tokenizer] = re.compile("|".join(names) or r"(?!)")
    return [_break_strings(part, pattern) for part in parts]


def _break_strings(value: Any, pattern: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        value = value.replace(_BREAK, "\ufffd")
        return pattern.sub(lambda found: found[0][0] + _BREAK + found[0][1:], value)
    if isinstance(value, dict):
        return {key: _break_strings(inner, pattern) for key, inner in value.items()}
    if isinstance(value, list):
        return [_break_strings(inner, pattern) for inner in value]
    return value
