"""A tokenizer in llama.cpp's terms: the metadata of a GGUF file that turns text into the same ids as the folder's own tokenizer.

llama.cpp has two tokenizers for the models of this library. `gpt2` is byte-level BPE: it merges by rank, within what a
pre-tokenizer cuts, and knows pre-tokenizers by name only. `llama` is SentencePiece's BPE: it merges whatever pair makes the
piece with the best score.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Pre-tokenizers: `llm_tokenizer_bpe` in llama.cpp's
src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from course_lib.data.templates import ChatTemplate, without_marks
from course_lib.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

SPACE = "▁"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (steps of the pre-tokenizer, whether a whole word that is a token needs no merges): llama.cpp's name for both
PRE_TOKENIZERS = {
    (("bytes of words",), False): "gpt-2",
    (("single digits", "bytes of words"), False): "smollm",
    ((QWEN2, "bytes"), False): "qwen2",
    ((LLAMA3, "bytes"), True): "llama-bpe",
    ((TEKKEN, "bytes"), True): "tekken",
}


@dataclass(frozen=True)
class Vocabulary:
    """What the metadata says of the tokens; `pre` and `merges` are of byte-level BPE alone, `scores` of SentencePiece."""

    kind: str
    tokens: list[str]
    types: list[int]
    pre: str = ""
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    space_prefix: bool = False


def vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """Describe a fast tokenizer; `rows` are those of the embedding, and ids without a token get a name of their own.

    llama.cpp normalises no text: where a tokenizer does (Qwen's to NFC), text in another form gets other ids there. And it puts
    SentencePiece's space before every text, also after a special token and before another space, where some tokenizers do not.
    It loads no byte-level tokenizer without merges, such as the random `tiny` model's; transformers does.

    Raises:
        InputError: it is neither kind of BPE, cuts text as no pre-tokenizer of llama.cpp does, or has more tokens than `rows`.
    """
    from gguf import TokenType

    if not hasattr(tokenizer, "backend_tokenizer"):
        raise InputError(f"{tokenizer.name_or_path}: its tokenizer runs in Python, and only tokenizer.json can be read")
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    model, name = settings["model"], tokenizer.name_or_path
    if model["type"] != "BPE":
        raise InputError(f"{name}: its tokenizer is of type {model['type']}; only BPE goes into a GGUF file here")
    ids = {**tokenizer.get_vocab()}
    if max(ids.values()) >= rows:
        raise InputError(
            f"{name}: its tokenizer has ids up to {max(ids.values())}, and the embedding {rows} rows; they do not belong together"
        )
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for token, number in ids.items():
        tokens[number], types[number] = token, int(TokenType.NORMAL)
    byte_level = "ByteLevel" in json.dumps(settings["pre_tokenizer"])
    if not byte_level:
        for token, number in ids.items():
            if re.fullmatch(r"<0x[0-9A-F]{2}>", token) and model["byte_fallback"]:
                types[number] = int(TokenType.BYTE)
    for number, added in tokenizer.backend_tokenizer.get_added_tokens_decoder().items():
        special = added.special or number in tokenizer.all_special_ids
        types[number] = int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
        if not special:  # looked for in the text as it is written
            tokens[number] = added.content.replace(SPACE, " ")
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    if byte_level:
        pre = _pre_tokenizer(settings, name) if pairs else "gpt-2"  # without merges, any way to cut gives single bytes
        return Vocabulary("gpt2", tokens, types, pre=pre, merges=tuple(" ".join(pair) for pair in pairs))
    if (unknown := tokenizer.unk_token_id) is not None:
        types[unknown] = int(TokenType.UNKNOWN)
    space_prefix = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0].startswith(SPACE)
    return Vocabulary(
        "llama",
        tokens,
        types,
        scores=_scores(tokens, pairs),
        space_prefix=_with_spaces(settings, name) and space_prefix,
    )


def _pre_tokenizer(settings: Mapping[str, Any], name: str) -> str:
    """llama.cpp's name for the way a byte-level tokenizer cuts text before it merges.

    Raises:
        InputError: it has none.
    """
    outer = settings["pre_tokenizer"]
    steps = tuple(map(_step, outer["pretokenizers"] if outer["type"] == "Sequence" else [outer]))
    if known := PRE_TOKENIZERS.get((steps, bool(settings["model"].get("ignore_merges")))):
        return known
    raise InputError(
        f"{name}: its tokenizer cuts text in a way that is not known here under a name of llama.cpp's ({', '.join(steps)}); "
        f"known are {', '.join(PRE_TOKENIZERS.values())}: use llama.cpp's convert_hf_to_gguf.py"
    )


def _step(step: Mapping[str, Any]) -> str:
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "bytes of words" if step["use_regex"] else "bytes"
    if kind == "Digits" and step["individual_digits"]:
        return "single digits"
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return step["pattern"].get("Regex") or f"the text {step['pattern'].get('String')!r}"
    return json.dumps(step)


def _with_spaces(settings: Mapping[str, Any], name: str) -> bool:
    """True where spaces become ▁ and nothing else cuts the text, as SentencePiece has it.

    Raises:
        InputError: it is otherwise.
    """
    cut = json.dumps(settings["pre_tokenizer"])
    metaspace = '"Metaspace"' in cut and '"split": false' in cut
    if (
        settings["pre_tokenizer"] is None and SPACE in json.dumps(settings["normalizer"], ensure_ascii=False)
    ) or metaspace:
        return True
    raise InputError(f"{name}: its tokenizer is neither byte-level BPE nor SentencePiece's; use llama.cpp's converter")


def _scores(tokens: list[str], pairs: list[list[str]]) -> tuple[float, ...]:
    """A score for each piece, such that the best-scored pair is the one that comes first among the merges."""
    rank: dict[str, int] = {}
    for number, pair in enumerate(pairs):
        rank.setdefault("".join(pair), number)
    return tuple(-float(rank.get(token, len(pairs) + number)) for number, token in enumerate(tokens))


def write_tokenizer(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None, rows: int
) -> None:
    """Add a tokenizer and its chat template to the metadata.

    The end of a turn is said apart from the end of text where they differ (`<eoa>` and `</s>`): llama.cpp stops at both.

    Raises:
        InputError: as for `vocabulary`.
    """
    words = vocabulary(tokenizer, rows)
    writer.add_tokenizer_model(words.kind)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.kind == "gpt2":
        writer.add_tokenizer_pre(words.pre)
        writer.add_token_merges(words.merges)
    else:
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(words.scores)
        writer.add_add_space_prefix(words.space_prefix)
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None:
            add(number)
    writer.add_add_bos_token(begins_with_bos(tokenizer))
    ids = tokenizer("a")["input_ids"]
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
    if template is not None:
        writer.add_chat_template(without_marks(template.source))
        turn = tokenizer(template.stop_texts[0], add_special_tokens=False)["input_ids"] if template.stop_texts else []
        if len(turn) == 1 and turn[0] != tokenizer.eos_token_id:
            writer.add_eot_token_id(turn[0])


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether whoever encodes plain text with this tokenizer gets its BOS first."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
