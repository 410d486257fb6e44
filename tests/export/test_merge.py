"""course_lib.export.merge: the merged model computes what base + adapter computes, and a failed merge destroys nothing."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from course_lib.errors import CourseError, InputError
from course_lib.export.merge import merge
from course_lib.models import base_fingerprint, load_model

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture
def variant(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make a base: float32, with the tiny model's tokenizer, and weights large enough that every layer counts."""

    def make(name: str = "base", *, shard: str = "1GB", dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        torch.manual_seed(1)
        model = LlamaForCausalLM(LlamaConfig(**shape, **heads, **settings))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim == 2 else torch.nn.init.uniform_(parameter, 0.5, 1)
        folder = tmp_path / name
        shutil.copytree(tiny, folder)
        (folder / "model.safetensors").unlink()
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
        return folder

    return make


def make_adapter(base: Path, folder: Path, *, record: dict[str, Any] | None = None, std: float = 0.2, **settings: Any) -> Path:
    """Save an adapter whose matrices, biases and whole tensors are all random and large; `record` makes a course.json."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR, "task_type": "CAUSAL_LM", **settings})
    model = get_peft_model(model, config)
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)
    if record is not None:
        record = {"base": str(base), "base_fingerprint": base_fingerprint(base), "double_quant": True, **record}
        (folder / "course.json").write_text(json.dumps(record))
    return folder


def logits(folder: Path, *, dtype: str = "float32", adapter: Path | None = None, **settings: Any) -> torch.Tensor:
    """(2, 20, vocabulary). With grad, bitsandbytes dequantises exactly; without, a CPU kernel may round to bfloat16."""
    model, _ = load_model(folder, dtype=dtype, device="cpu", adapter=adapter, **settings)
    return model(TOKENS).logits.detach() if dtype == "float32" else model.train()(TOKENS).logits.detach()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


SAME = {
    "tied": ({"tie_word_embeddings": True}, {}),
    "untied": ({}, {}),
    "sharded": ({"shard": "50KB"}, {}),
    "biased": ({"attention_bias": True, "mlp_bias": True}, {}),
    "rslora": ({}, {"use_rslora": True, "r": 8}),
    "patterns": ({}, {"rank_pattern": {"q_proj": 8, "0.mlp.up_proj": 2}, "alpha_pattern": {"v_proj": 32, "1.mlp.*": 3}}),
    "trained biases": ({"attention_bias": True}, {"bias": "all"}),
    "biases of adapted layers": ({"attention_bias": True}, {"bias": "lora_only"}),
    "lora bias": ({"attention_bias": True}, {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]}),
    "head and norms trained whole": ({}, {"modules_to_save": ["lm_head", "input_layernorm"]}),
    "embedding and head": ({}, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "one layer only": ({}, {"layers_to_transform": [1]}),
    "fan_in_fan_out on linear layers": ({}, {"fan_in_fan_out": True}),
    "rank 1": ({}, {"r": 1}),
}


@pytest.mark.parametrize("case", SAME)
def test_merged_equals_base_and_adapter(case: str, variant: Callable[..., Path], tmp_path: Path) -> None:
    base_settings, adapter_settings = SAME[case]
    base = variant(**base_settings)
    adapter = make_adapter(base, tmp_path / "adapter", record={"dtype": "float32"}, **adapter_settings)
    merged = merge(base, adapter, tmp_path / "merged")
    expected = logits(base, adapter=adapter)
    assert largest(expected, logits(base)) > 0.5  # the adapter matters
    assert largest(expected, logits(merged)) < 1e-4
