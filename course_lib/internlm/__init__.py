"""InternLM, InternLM2 (and 2.5) and InternLM3 checkpoints as the Llamas they are, without the Python code in their folders.

`layout` knows the tensors' names and places in a file, `model` loads them into transformers' Llama, `tokenizer` reads the
SentencePiece model, and `adapter` takes LoRA adapters from one set of names to the other.
"""

from __future__ import annotations

from typing import Any

FAMILIES = ("internlm", "internlm2", "internlm3")  # `model_type` in config.json


def is_internlm(config: dict[str, Any]) -> bool:
    """Whether a config.json is of one of these families."""
    return config.get("model_type") in FAMILIES
