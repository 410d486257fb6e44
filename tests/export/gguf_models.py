"""Small random models and byte-level tokenizers for the GGUF tests."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from course_lib.data.templates import named_template
from course_lib.export.gguf_tokenizer import LLAMA3, QWEN2, TEKKEN

TOKENS = torch.arange(3, 43).reshape(2, 20)
SHAPE = {"vocab_size": 264, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
ROPE = {"rope_theta": 10000.0}
LLAMA3_ROPE = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 32}),
    "llama, odd rows": ("llama", {"intermediate_size": 120}),
    "llama, dynamic rope": ("llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}


def save_model(
    tiny: Path, folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any
) -> Path:
    """Save a random model whose every layer counts, with the tiny model's tokenizer."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **{**SHAPE, **HEADS, **settings})
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim == 2 else torch.nn.init.uniform_(parameter, 0.5, 1)
    shutil.copytree(tiny, folder)
    model.to(dtype).save_pretrained(folder)
    return folder


ODD = ["🙂", "👩‍🚀", "é", "ß", "\n", "\t", "\r\n", " ", "  ", "   ", "don't", "I'LL", "123", "4567890", "한국어", "世界", "\u3000", "ﬁ", "①", "…!?", "/*", "x_1", "<think>", "<|im_end|>"]  # fmt: skip
WORDS = ["hello", "world", "Model", "the", "fine-tune", "你好", "мир", "don't", "2024", "x=1;"]


def texts(count: int = 300) -> list[str]:
    """Words, odd characters and random ones of many scripts, glued with and without spaces."""
    generator, made = random.Random(0), ["", " ", "\n", " a", "a ", "1 2  3   4"]
    scripts = [(32, 126), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF), (0xA0, 0x24F), (0x400, 0x4FF)]
    for _ in range(count):
        parts = []
        for kind in generator.choices(("word", "odd", "random"), (5, 4, 1), k=generator.randint(1, 8)):
            if kind == "random":
                parts.append("".join(chr(generator.randint(*generator.choice(scripts))) for _ in range(6)))
            else:
                parts.append(generator.choice(WORDS if kind == "word" else ODD))
        made.append(generator.choice(["", " "]).join(parts))
    return made


def split_by(regex: str) -> Any:
    """A pre-tokenizer as the byte-level models since GPT-4 have it."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


BYTE_LEVEL: dict[str, tuple[Callable[[], Any], bool]] = {
    "gpt-2": (lambda: pre_tokenizers.ByteLevel(add_prefix_space=False), False),
    "smollm": (
        lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        False,
    ),
    "qwen2": (lambda: split_by(QWEN2), False),
    "llama-bpe": (lambda: split_by(LLAMA3), True),
    "tekken": (lambda: split_by(TEKKEN), True),
}


def with_byte_level(folder: Path, pre: str, **changes: Any) -> Path:
    """Train a byte-level tokenizer of that kind and put it into a model's folder."""
    cut, ignore_merges = BYTE_LEVEL[pre]
    backend = Tokenizer(models.BPE(ignore_merges=changes.pop("ignore_merges", ignore_merges)))
    backend.pre_tokenizer, backend.decoder = changes.pop("cut", cut)(), decoders.ByteLevel()
    backend.normalizer = changes.pop("normalizer", None)
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"] + 236 - 8,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts(2000), trainer)
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False, **changes,
    )  # fmt: skip
    tokenizer.chat_template = named_template("smollm2").source
    tokenizer.save_pretrained(folder)
    return folder


def with_sentencepiece(folder: Path) -> Path:
    """Train a tokenizer such as Llama 2's and Mistral's, which are kept as tokenizer.json alone, and put it into a model's folder."""
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], limit_alphabet=120, show_progress=False
    )
    learner.train_from_iterator(texts(2000), trainer)
    learned = json.loads(learner.to_str())["model"]
    spare = {f"<0x{byte:02X}>": len(learned["vocab"]) + byte for byte in range(256)}
    merges = [tuple(pair) for pair in learned["merges"]]
    backend = Tokenizer(
        models.BPE(
            vocab={**learned["vocab"], **spare}, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names, clean_up_tokenization_spaces=False)
    tokenizer.chat_template = named_template("mistral").source
    tokenizer.save_pretrained(folder)
    return folder
