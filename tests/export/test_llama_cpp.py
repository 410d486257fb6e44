"""The files of `course export gguf` in llama.cpp itself, where llama-cpp-python is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import (
    BYTE_LEVEL,
    LLAMA3_ROPE,
    ROPE,
    SHAPES,
    TOKENS,
    save_model,
    texts,
    with_byte_level,
    with_sentencepiece,
)

from course_lib.export.gguf import export_gguf
from course_lib.models import load_model, load_tokenizer

llama_cpp = pytest.importorskip("llama_cpp")


def run(file: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of one row, (tokens, vocabulary), with keys and values kept in float32."""
    kept = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    model = llama_cpp.Llama(str(file), n_ctx=2048, n_threads=1, logits_all=True, verbose=False, **kept)
    model.eval(tokens.tolist())
    return torch.tensor(model.scores[: len(tokens)])


SCALED = {
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "linear rope": ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}}),
    "yarn": (
        "qwen2",
        {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
    ),
}


@pytest.mark.parametrize("name", [*SHAPES, *SCALED])
def test_llama_cpp_computes_what_transformers_does(name: str, tiny: Path, tmp_path: Path) -> None:
    kind, settings = {**SHAPES, **SCALED}[name]
    folder = with_byte_level(save_model(tiny, tmp_path / "model", kind, vocab_size=500, **settings), "gpt-2")
    tokens = torch.arange(3, 203) if name in SCALED else TOKENS[0]  # far enough apart for the rotations to differ
    expected = load_model(folder, dtype="float32", device="cpu")[0](tokens[None]).logits[0].detach()
    computed = run(export_gguf(folder, tmp_path / "m.gguf", type="f32"), tokens)
    assert (computed - expected).square().mean().sqrt() < 2e-3 * expected.square().mean().sqrt()


@pytest.mark.parametrize("pre", [*BYTE_LEVEL, "sentencepiece"])
def test_llama_cpp_cuts_text_as_the_folder_does(pre: str, tiny: Path, tmp_path: Path) -> None:
    folder = save_model(tiny, tmp_path / "model", vocab_size=900)
    folder = with_sentencepiece(folder) if pre == "sentencepiece" else with_byte_level(folder, pre)
    file = export_gguf(folder, tmp_path / "m.gguf")
    own, theirs = load_tokenizer(folder), llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for text in texts():
        # tokenizers puts no space before another one, llama.cpp and SentencePiece do; and llama.cpp takes any piece that is
        # spelt as an end of turn for one
        if pre == "sentencepiece" and (text.startswith(" ") or "<|im_end|>" in text):
            continue
        ids = theirs.tokenize(text.encode(), add_bos=False, special=True)
        assert ids == own(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.embedded
@pytest.mark.slow
@pytest.mark.parametrize("type", ["f16", "q8_0"])
def test_the_embedded_model_answers_in_llama_cpp(type: str, embedded: Path, tmp_path: Path) -> None:
    file = export_gguf(embedded, tmp_path / "m.gguf", type=type)
    model: Any = llama_cpp.Llama(str(file), n_ctx=256, n_threads=2, verbose=False)
    question = {"role": "user", "content": "What is the capital of France?"}
    answer = model.create_chat_completion([question], temperature=0, max_tokens=40)["choices"][0]
    assert "Paris" in answer["message"]["content"]
    assert answer["finish_reason"] == "stop"
