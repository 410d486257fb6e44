"""InternLM as GGUF: fused matrices taken apart, biases turned with their rows, SentencePiece ids as llama.cpp makes them."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import FAMILIES
from test_sentencepiece import texts
from transformers import AutoModelForCausalLM, LlamaConfig

from course_lib.export.gguf import export_gguf
from course_lib.models import load_model, load_tokenizer

TOKENS = torch.arange(40, 60)


def fields(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


@pytest.mark.parametrize(
    ("family", "bias"),
    [("internlm", False), ("internlm", True), ("internlm2", False), ("internlm2", True), ("internlm3", False)],
)
def test_float32_is_read_back_exactly(family: str, bias: bool, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint(family, bias=bias)
    model, _ = load_model(folder, dtype="float32", device="cpu")
    file = export_gguf(folder, tmp_path / "m.gguf", type="f32")
    own = {**LlamaConfig.from_pretrained(folder).to_dict()}
    config = LlamaConfig(**{key: getattr(model.config, key) for key in own if hasattr(model.config, key)})
    with redirect_stderr(io.StringIO()):
        read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, config=config, dtype=torch.float32)
    assert config.attention_bias == bias
    assert torch.equal(read(TOKENS[None]).logits, model(TOKENS[None]).logits)
    assert fields(file)["llama.context_length"] == 24


def cut_as_llama_cpp(told: dict[str, Any], text: str) -> list[int]:
    """Ids by `llm_tokenizer_spm` of llama.cpp's src/llama-vocab.cpp, for a text without special tokens: neighbours that make the
    best-scored piece are joined, the first of equals first; what is no piece at the end goes as bytes."""
    tokens, scores = told["tokenizer.ggml.tokens"], told["tokenizer.ggml.scores"]
    ids = {token: number for number, token in enumerate(tokens)}
    if told["tokenizer.ggml.add_space_prefix"]:
        text = f" {text}"
    symbols = [*text.replace(" ", "▁")]
    while True:
        joined = [(scores[ids[a + b]], -at) for at, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in ids]
        if not joined:
            break
        at = -max(joined)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return [
        number
        for symbol in symbols
        for number in ([ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()])
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_in_llama_cpp_are_those_of_the_folder(family: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint(family)
    file = export_gguf(folder, tmp_path / "m.gguf")
    own, told = load_tokenizer(folder), fields(file)
    assert told["tokenizer.ggml.model"] == "llama"
    assert told["tokenizer.ggml.add_space_prefix"] == (family == "internlm")
    assert told["tokenizer.ggml.add_bos_token"]
    ends = {"internlm": "<eoa>", "internlm2": "<|im_end|>", "internlm3": "<|im_end|>"}
    assert told["tokenizer.ggml.tokens"][told["tokenizer.ggml.eot_token_id"]] == ends[family]
    assert told["tokenizer.ggml.tokens"][told["tokenizer.ggml.eos_token_id"]] == "</s>"
    for text in texts(300):
        if text and not any(token in text for token in ("<0x", "▁", *own.get_added_vocab())):
            assert cut_as_llama_cpp(told, text) == own(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_cuts_and_computes_the_same(family: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = checkpoint(family, max_position_embeddings=256)
    file = export_gguf(folder, tmp_path / "m.gguf", type="f32")
    model, own = load_model(folder, dtype="float32", device="cpu")
    kept = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    theirs = llama_cpp.Llama(str(file), n_ctx=256, n_threads=1, logits_all=True, verbose=False, **kept)
    theirs.eval(TOKENS.tolist())
    expected = model(TOKENS[None]).logits[0].detach()
    difference = torch.tensor(theirs.scores[: len(TOKENS)]) - expected
    assert difference.square().mean().sqrt() < 2e-3 * expected.square().mean().sqrt()
    for text in [*texts(300), *(f"{token}a{token} b" for token in own.get_added_vocab())]:
        if text and "<0x" not in text and "▁" not in text:
            ids = theirs.tokenize(text.encode(), add_bos=False, special=True)
            assert ids == own(text, add_special_tokens=False)["input_ids"], text
