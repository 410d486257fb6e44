"""The converted tokenizers beside the `sentencepiece` package, on small models trained here."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from reference import SPECIAL, sentences

from course_lib.data.templates import choose_template, named_template, render, stop_token_ids
from course_lib.data.tokenize import encode_conversation, encode_prompt
from course_lib.errors import InputError
from course_lib.internlm.tokenizer import to_fast
from course_lib.models import load_tokenizer

SYMBOLS = ["<eoh>", "<eoa>", "[UNUSED_TOKEN_1]", "[UNUSED_TOKEN_11]"]
ODD = ["🙂", "👩‍🚀", "é", "ß", "\n", "\t", "\r\n", " ", "  ", "   ", "▁", "<0x41>", "====", "aaaa", "ababab", "123", "한국어", "\u3000", "ﬁ", "①"]  # fmt: skip
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "hello 世界"},
    {"role": "assistant", "content": " 你好 world\n"},
]
OWN = (  # as in tokenizer_config.json of internlm2-chat: no form for tools
    "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def texts(count: int, extra: Sequence[str] = (), seed: int = 1) -> list[str]:
    """Sentences, odd characters and random ones of many scripts, glued with and without spaces."""
    generator, made = random.Random(seed), ["", " ", "\n", " a", "a ", "▁"]
    scripts = [(32, 126), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF), (0xA0, 0x24F), (0x400, 0x4FF)]
    for _ in range(count):
        parts = []
        for kind in generator.choices(("sentence", "odd", "random"), (5, 4, 1), k=generator.randint(1, 6)):
            if kind == "random":
                parts.append("".join(chr(generator.randint(*generator.choice(scripts))) for _ in range(8)))
            else:
                parts += sentences(generator, 1) if kind == "sentence" else [generator.choice([*ODD, *extra])]
        made.append(generator.choice(["", " "]).join(parts))
    return made


@pytest.mark.parametrize("extra_spaces", [False, True])
@pytest.mark.parametrize("symbols", [[], SYMBOLS], ids=["plain", "symbols"])
@pytest.mark.parametrize("prefix", [True, False])
def test_ids_and_text_are_those_of_sentencepiece(
    prefix: bool, symbols: list[str], extra_spaces: bool, train_sentencepiece: Callable[..., bytes], tmp_path: Path
) -> None:
    model = train_sentencepiece(
        add_dummy_prefix=prefix, user_defined_symbols=symbols, remove_extra_whitespaces=extra_spaces
    )
    (tmp_path / "t.model").write_bytes(model)
    truth, fast = sentencepiece.SentencePieceProcessor(model_proto=model), to_fast(tmp_path / "t.model", {})
    pieces = [truth.id_to_piece(number) for number in range(len(truth)) if not truth.is_control(number)]
    alone = {*symbols} if prefix else set()  # a symbol by itself gets no prefix, as the docstring says
    for text in [*texts(400, symbols), *pieces]:
        if text.strip(" ") in alone or text.startswith("<0x") or (extra_spaces and {"▁"} & {*text}):
            continue
        ids = fast.encode(text, add_special_tokens=False).ids
        assert ids == truth.encode(text), text
        assert fast.decode(ids) == truth.decode(ids), text


def test_without_byte_fallback_what_is_unknown_is_one_token(
    train_sentencepiece: Callable[..., bytes], tmp_path: Path
) -> None:
    model = train_sentencepiece(byte_fallback=False, vocab_size=200)
    (tmp_path / "t.model").write_bytes(model)
    truth, fast = sentencepiece.SentencePieceProcessor(model_proto=model), to_fast(tmp_path / "t.model", {})
    for text in texts(100):
        assert fast.encode(text).ids == truth.encode(text), text


def test_a_normalising_model_is_followed(train_sentencepiece: Callable[..., bytes], tmp_path: Path) -> None:
    model = train_sentencepiece(normalization_rule_name="nmt_nfkc")
    (tmp_path / "t.model").write_bytes(model)
    truth, fast = sentencepiece.SentencePieceProcessor(model_proto=model), to_fast(tmp_path / "t.model", {})
    for text in (text for text in texts(300) if "\r\n" not in text):
        assert fast.encode(text).ids == truth.encode(text), text


def as_the_code_on_the_hub(folder: Path, text: str) -> list[int]:
    """BOS, then text cut at the special tokens, and what lies between them by SentencePiece."""
    import re

    truth = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    special = {token["content"]: int(number) for number, token in settings["added_tokens_decoder"].items()}
    special |= {"<unk>": 0, "<s>": 1, "</s>": 2}
    ids = [1]
    for part in re.split("(" + "|".join(map(re.escape, special)) + ")", text):
        ids += [special[part]] if part in special else truth.encode(part)
    return ids


@pytest.mark.parametrize("family", ["internlm", "internlm2", "internlm3"])
def test_text_with_special_tokens_is_cut_as_the_code_on_the_hub_cuts_it(
    family: str, checkpoint: Callable[..., Path]
) -> None:
    folder = checkpoint(family)
    tokenizer = load_tokenizer(folder)
    special = [*SPECIAL[family], "</s>", "<s>"]
    for text in texts(300, special):
        assert tokenizer.encode(text) == as_the_code_on_the_hub(folder, text), text
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == as_the_code_on_the_hub(folder, text)[1:]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (
        1,
        2,
        2,
        0,
    )
    settings = json.loads((folder / "config.json").read_text())
    assert len(tokenizer) == settings["vocab_size"]
    assert tokenizer.decode(tokenizer.encode("hello 世界 🙂"), skip_special_tokens=True) == "hello 世界 🙂"


@pytest.mark.parametrize("family", ["internlm", "internlm2", "internlm3"])
def test_special_tokens_are_one_id_each_in_the_place_the_folder_gives_them(
    family: str, checkpoint: Callable[..., Path]
) -> None:
    folder = checkpoint(family)
    tokenizer = load_tokenizer(folder)
    listed = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert len(listed) == len(SPECIAL[family])
    for number, token in listed.items():
        assert tokenizer.encode(token["content"], add_special_tokens=False) == [int(number)]
        assert tokenizer.convert_ids_to_tokens(int(number)) == token["content"]
        assert token["content"] in tokenizer.all_special_tokens


@pytest.mark.parametrize(
    ("family", "own", "name"),
    [
        ("internlm", None, "internlm_chat"),
        ("internlm2", None, "internlm2_chat"),
        ("internlm2", OWN, "internlm2_chat"),
        ("internlm3", OWN, "internlm2_chat"),
        ("internlm2", OWN.replace("'\\n'", "' '"), "the tokenizer's own"),
    ],
)
def test_the_familys_template_is_chosen(
    family: str, own: str | None, name: str, checkpoint: Callable[..., Path]
) -> None:
    folder = checkpoint(family)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": own}))
    tokenizer = load_tokenizer(folder)
    template = choose_template(tokenizer)
    assert template.name == name
    if name == "the tokenizer's own":
        return
    example = encode_conversation({"messages": TURNS}, template, tokenizer)
    text = render(TURNS, template, tokenizer).text
    assert example.input_ids == as_the_code_on_the_hub(folder, text)[1:]
    assert example.input_ids.count(1) == 1
    prompt = encode_prompt(TURNS[:1], template, tokenizer)
    assert example.input_ids[: len(prompt)] == prompt
    end = tokenizer.convert_tokens_to_ids(template.stop_texts[0])
    assert end in stop_token_ids(template, tokenizer)
    assert [label for label in example.labels if label >= 0][-1] == end


def test_without_its_special_tokens_a_base_model_has_no_chat_template(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("internlm2")
    (folder / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("a") == as_pieces(folder, "a")
    with pytest.raises(InputError, match="no chat template"):
        choose_template(tokenizer)


def as_pieces(folder: Path, text: str) -> list[int]:
    truth = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return [1, *truth.encode(text)]


@pytest.mark.parametrize("family", ["internlm", "internlm2"])
def test_a_folder_with_tokenizer_json_alone(family: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint(family)
    tokenizer = load_tokenizer(folder)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "tokenizer.model").exists()
    shutil.copy(folder / "config.json", tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    for text in texts(100, SPECIAL[family]):
        assert again.encode(text) == tokenizer.encode(text), text
    assert choose_template(again).name == named_template(f"{family}_chat").name


def test_a_piece_of_the_same_spelling_gives_way_to_the_added_token(checkpoint: Callable[..., Path]) -> None:
    """`<eoh>` is a piece of InternLM's first tokenizers, and an added token with another id."""
    folder = checkpoint("internlm")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    moved = {str(500 + number): token for number, token in enumerate(settings["added_tokens_decoder"].values())}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "added_tokens_decoder": moved}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("a<eoh>b") == as_the_code_on_the_hub(folder, "a<eoh>b")
    assert tokenizer.convert_tokens_to_ids(["<eoh>", "<eoa>"]) == [500, 501]


def test_added_tokens_of_older_folders(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("internlm3")
    (folder / "tokenizer_config.json").unlink()
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 501, "<|im_start|>": 500}))
    assert load_tokenizer(folder).encode("<|im_end|>") == [1, 501]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder, _: (folder / "tokenizer.model").write_bytes(b"\xff" * 100), "is no SentencePiece model"),
        (lambda folder, _: (folder / "tokenizer.model").write_bytes(b""), "is no SentencePiece model"),
        (lambda folder, _: (folder / "tokenizer.model").unlink(), "neither tokenizer.model nor tokenizer.json"),
        (
            lambda folder, train: (folder / "tokenizer.model").write_bytes(train(model_type="unigram", vocab_size=400)),
            "is no BPE model",
        ),
        (
            lambda folder, _: (folder / "added_tokens.json").write_text(json.dumps({"<new>": 777})),
            "500 pieces leave no room for the added token '<new>' with the id 777",
        ),
    ],
)
def test_a_damaged_tokenizer_is_told(
    spoil: Any, words: str, checkpoint: Callable[..., Path], train_sentencepiece: Callable[..., bytes]
) -> None:
    folder = checkpoint("internlm2")
    spoil(folder, train_sentencepiece)
    with pytest.raises(InputError, match=words):
        load_tokenizer(folder)
