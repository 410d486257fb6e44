"""The families' tokenizers from their SentencePiece model, without the Python code in the folder.

Text is cut as `InternLMTokenizer`, `InternLM2Tokenizer` and `InternLM3Tokenizer` cut it: first at the added tokens of
tokenizer_config.json, then each part between them by SentencePiece, with its dummy prefix where the model has one. The chat
models' special tokens stand in the places of unused pieces.

Format: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.data.templates import extends, named_template
from course_lib.errors import InputError
from course_lib.files import read_json

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of a piece
BPE = 2  # type of a model
SPACE = "▁"
NAMED_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "</s>",
}  # the classes' defaults
TEMPLATES = {"internlm": "internlm_chat", "internlm2": "internlm2_chat", "internlm3": "internlm2_chat"}


def internlm_tokenizer(folder: Path, family: str) -> PreTrainedTokenizerFast:
    """Make a fast tokenizer from the folder's tokenizer.model, or read its tokenizer.json where there is no other.

    It begins what it encodes with `<s>`, unless tokenizer_config.json says otherwise. Its chat template is the family's named
    one where that writes whatever the folder's own does, and where it has none; only if the token that ends a turn is one id.

    Raises:
        InputError: neither file is there, or it is damaged, or of a kind that these families do not use.
    """
    from transformers import PreTrainedTokenizerFast

    if (folder / "tokenizer.model").is_file():
        tokenizer = _from_sentencepiece(folder)
    elif (folder / "tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    else:
        raise InputError(f"{folder}: holds neither tokenizer.model nor tokenizer.json; fetch the model again")
    named = named_template(TEMPLATES[family])
    end_of_turn = tokenizer.encode(named.stop_texts[0], add_special_tokens=False)
    if len(end_of_turn) == 1 and extends(named, tokenizer):
        tokenizer.chat_template = named.source
    return tokenizer


def _from_sentencepiece(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    file, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    settings = read_json(file) if file.is_file() else {}
    own = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=to_fast(folder / "tokenizer.model", _added_tokens(folder, settings)),
        name_or_path=str(folder),
        **{name: _text(settings.get(name) or default) for name, default in NAMED_TOKENS.items()},
        additional_special_tokens=[_text(token) for token in settings.get("additional_special_tokens") or []],
        add_bos_token=settings.get("add_bos_token", True),
        add_eos_token=settings.get("add_eos_token", False),
        chat_template=own,
        clean_up_tokenization_spaces=False,
    )


def to_fast(model_file: Path, added: dict[int, AddedToken]) -> Tokenizer:
    """Convert a SentencePiece BPE model into a fast tokenizer that gives the same ids.

    `added` tokens, by id, take the places of pieces or come after them; text is cut at them before anything else is done.
    Two texts are cut otherwise than by SentencePiece: with a dummy prefix, one that is a user-defined symbol and nothing else
    gets no prefix; and with a normalisation rule such as nmt_nfkc, "\\r\\n" is normalised as
    one character.

    Raises:
        InputError: the file is no SentencePiece model, or one that cannot be converted.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers.convert_slow_tokenizer import generate_merges

    proto = _read_model(model_file)
    rules = proto.normalizer_spec
    kinds = [CONTROL if number in added else piece.type for number, piece in enumerate(proto.pieces)]
    pieces = _piece_names([piece.piece for piece in proto.pieces], added)
    ids = {piece: number for number, piece in enumerate(pieces)}
    # A piece is merged from two others, the likeliest first. What is no normal piece is never merged, nor a part of one.
    scores = [(piece, one.score) for piece, one in zip(pieces, proto.pieces, strict=True)]
    symbols = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == USER_DEFINED]
    fast = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=generate_merges(
                ids, scores, skip_tokens={piece for piece, kind in zip(pieces, kinds, strict=True) if kind != NORMAL}
            ),
            unk_token=pieces[proto.trainer_spec.unk_id],
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    fast.normalizer = _normalizer(rules, symbols)
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        decoding.append(decoders.Strip(" ", 1, 0))
    fast.decoder = decoders.Sequence(decoding)
    fast.add_tokens([AddedToken(symbol, normalized=True, special=False) for symbol in symbols])
    fast.add_tokens([added[number] for number in sorted(added)])
    if wrong := [number for number, token in added.items() if fast.token_to_id(token.content) != number]:
        raise InputError(
            f"{model_file}: {len(pieces)} pieces leave no room for the added token {added[wrong[0]].content!r} with the id "
            f"{wrong[0]}; fetch the tokenizer again"
        )
    return fast


def _normalizer(rules: Any, symbols: list[str]) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        for pattern, kept in ((r"\A +", ""), (rf"[ {SPACE}]+\z", ""), (" {2,}", " ")):
            steps.append(normalizers.Replace(Regex(pattern), kept))
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    if rules.add_dummy_prefix and symbols:
        # A symbol is looked for in text that has its prefix already, so that none comes after it. The symbols' own spellings
        # go through these steps too, and are to come out without one.
        spellings = "|".join("".join(f"\\x{{{ord(letter):X}}}" for letter in symbol) for symbol in symbols)
        steps.append(normalizers.Replace(Regex(rf"\A{SPACE}(?=(?:{spellings})\z)"), ""))
    return normalizers.Sequence(steps)


def _read_model(model_file: Path) -> Any:
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(model_file.read_bytes())
    except DecodeError as error:
        raise InputError(f"{model_file}: is no SentencePiece model; fetch the model again") from error
    if not proto.pieces:
        raise InputError(f"{model_file}: is no SentencePiece model; fetch the model again")
    if proto.trainer_spec.model_type != BPE or proto.trainer_spec.treat_whitespace_as_suffix:
        raise InputError(f"{model_file}: is no BPE model with spaces before words, as all InternLM models are")
    return proto


def _piece_names(pieces: list[str], added: dict[int, AddedToken]) -> list[str]:
    """The vocabulary's text of each id: the added token's where there is one. A piece of the same spelling elsewhere, which
    text cut at the added token never reaches, gives way."""
    taken = {token.content for token in added.values()}
    return [
        added[number].content if number in added else f"{piece}#{number}" if piece in taken else piece
        for number, piece in enumerate(pieces)
    ]


def _added_tokens(folder: Path, settings: dict[str, Any]) -> dict[int, AddedToken]:
    """The tokens that tokenizer_config.json lists by id, and before transformers 4.34 added_tokens.json by text."""
    from tokenizers import AddedToken

    older = folder / "added_tokens.json"
    listed: dict[str, Any] = {str(number): text for text, number in read_json(older).items()} if older.is_file() else {}
    listed |= settings.get("added_tokens_decoder") or {}
    added = {}
    for number, token in listed.items():
        flags = token if isinstance(token, dict) else {}
        sides = {side: flags.get(side, False) for side in ("lstrip", "rstrip", "single_word")}
        added[int(number)] = AddedToken(_text(token), **sides, special=flags.get("special", True), normalized=False)
    return added


def _text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]
