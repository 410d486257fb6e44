from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reference import SPECIAL, SYMBOLS, random_tensors, save_checkpoint, sentences, settings_of


@pytest.fixture(scope="session")
def train_sentencepiece() -> Callable[..., bytes]:
    """Train a small SentencePiece model and return its bytes; the same settings are trained once."""
    import sentencepiece

    trained: dict[str, bytes] = {}

    def train(**settings: Any) -> bytes:
        key = json.dumps(settings, sort_keys=True)
        if key not in trained:
            generator, buffer = random.Random(0), io.BytesIO()
            corpus = sentences(generator, 1500)
            corpus += ["==== aaaa  bbbb   " + " ".join("ab" * generator.randint(1, 6) for _ in range(4))] * 100
            usual = {
                "model_type": "bpe",
                "vocab_size": 500,
                "byte_fallback": True,
                "character_coverage": 0.995,
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                "allow_whitespace_only_pieces": True,
                "split_digits": True,
                "minloglevel": 2,
                "num_threads": 1,
            }
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(corpus), model_writer=buffer, **{**usual, **settings}
            )
            trained[key] = buffer.getvalue()
        return trained[key]

    return train


@pytest.fixture
def checkpoint(tmp_path: Path, train_sentencepiece: Callable[..., bytes]) -> Callable[..., Path]:
    """Write a family's folder: config.json, weights, tokenizer.model and tokenizer_config.json as the chat models have them."""

    def make(family: str, name: str = "base", *, kind: str = "safetensors", seed: int = 0, **changes: Any) -> Path:
        tokens = train_sentencepiece(add_dummy_prefix=family == "internlm", user_defined_symbols=SYMBOLS[family])
        first = {"internlm": 3, "internlm2": 3, "internlm3": 500}[family]
        placed = {first + number: token for number, token in enumerate(SPECIAL[family])}
        settings = settings_of(family, vocab_size=500 + (len(placed) if first == 500 else 0), **changes)
        folder = save_checkpoint(tmp_path / name, settings, random_tensors(settings, seed), kind)
        (folder / "tokenizer.model").write_bytes(tokens)
        flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
        described = {
            "auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]},
            "tokenizer_class": "InternLM2Tokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "</s>",
            "additional_special_tokens": [*placed.values()],
            "added_tokens_decoder": {str(number): {"content": token, **flags} for number, token in placed.items()},
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(described))
        return folder

    return make
