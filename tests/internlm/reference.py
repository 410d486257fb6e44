"""Small random InternLM checkpoints and texts, and what the published architecture computes from their tensors: plain float64, no library's model.

RMSNorm, rotation of halves with a base by the text's length, query heads in groups, SwiGLU.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

ENGLISH = "the of and to in a model learns language small large train loss token attention question answer hello world course machine"
CHINESE = "模型学习语言小大训练损失词元注意力问题回答你好世界课程机器我是书生浦语的在了不"
SYMBOLS = {
    "internlm": ["<eoh>", "<eoa>"],
    "internlm2": [f"[UNUSED_TOKEN_{number}]" for number in range(1, 7)],
    "internlm3": [],
}
# the special tokens of each family's chat models, last first
SPECIAL = {
    "internlm": ["<eoh>", "<eoa>"],
    "internlm2": ["<|im_start|>", "<|im_end|>", "<|action_start|>", "<|action_end|>", "<|interpreter|>", "<|plugin|>"],
    "internlm3": ["<|im_start|>", "<|im_end|>"],
}

COMMON = {
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 24,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "transformers_version": "4.41.0",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "internlm": {
        "architectures": ["InternLMForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM"},
        "bias": True,
        "rotary": {"base": 10000, "type": "dynamic"},
    },
    "internlm2": {
        "architectures": ["InternLM2ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
        "attn_implementation": "eager",
        "bias": False,
        "num_key_value_heads": 2,
        "rope_theta": 1000000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "internlm3": {
        "architectures": ["InternLM3ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_internlm3.InternLM3ForCausalLM"},
        "bias": False,
        "qkv_bias": False,
        "head_dim": 8,
        "num_key_value_heads": 2,
        "rope_theta": 50000000,
        "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
    },
}


def sentences(generator: random.Random, count: int) -> list[str]:
    """English and Chinese, by turns."""
    made = []
    for _ in range(count):
        if generator.random() < 0.5:
            made.append(
                " ".join(generator.choices(ENGLISH.split(), k=generator.randint(3, 12))) + generator.choice(".!?")
            )
        else:
            made.append("".join(generator.choices(CHINESE, k=generator.randint(4, 20))) + generator.choice("。！？"))
    return made


def settings_of(family: str, vocab_size: int = 320, **changes: Any) -> dict[str, Any]:
    """A config.json as the Hub has it."""
    return {**COMMON, **FAMILIES[family], "model_type": family, "vocab_size": vocab_size, **changes}


def random_tensors(settings: dict[str, Any], seed: int = 0) -> Tensors:
    """All tensors under their names in the checkpoint, float32, large enough that every one of them counts."""
    width, middle, vocabulary = settings["hidden_size"], settings["intermediate_size"], settings["vocab_size"]
    head_dim = width // settings["num_attention_heads"]
    kv_width = settings.get("num_key_value_heads", settings["num_attention_heads"]) * head_dim
    if settings["model_type"] == "internlm2":
        names = {"attention.wqkv": (width + 2 * kv_width, width), "attention.wo": (width, width)}
        names |= {"feed_forward.w1": (middle, width), "feed_forward.w3": (middle, width)}
        names |= {"feed_forward.w2": (width, middle), "attention_norm": (width,), "ffn_norm": (width,)}
        biased, ends = ("attention.",), ("model.tok_embeddings", "output")
    else:
        names = {f"self_attn.{part}_proj": (kv_width, width) for part in "kv"}
        names |= {"self_attn.q_proj": (width, width), "self_attn.o_proj": (width, width)}
        names |= {"mlp.gate_proj": (middle, width), "mlp.up_proj": (middle, width), "mlp.down_proj": (width, middle)}
        names |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
        biased, ends = ("self_attn.",), ("model.embed_tokens", "lm_head")
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (vocabulary, width) for name in ends}
    shapes["model.norm.weight"] = (width,)
    for layer in range(settings["num_hidden_layers"]):
        for name, shape in names.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
            if settings.get("bias") and name.startswith(biased) and "norm" not in name:
                shapes[f"model.layers.{layer}.{name}.bias"] = shape[:1]
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.2 if len(shape) == 2 else 0.3)
        for name, shape in sorted(shapes.items())
    }
    tensors |= {name: 0.75 + 0.2 * tensor for name, tensor in tensors.items() if "norm" in name}
    if settings["model_type"] == "internlm":  # what the code's register_buffer put into the checkpoints of type dynamic
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(head_dim // 2)
    return tensors


def save_checkpoint(folder: Path, settings: dict[str, Any], tensors: Tensors, kind: str = "safetensors") -> Path:
    """Write config.json and the tensors in two files, `kind` safetensors or bin."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    stem = "model" if kind == "safetensors" else "pytorch_model"
    files = {name: f"{stem}-{1 + ('layers.1' in name):05d}-of-00002.{kind}" for name in tensors}
    for file in sorted(set(files.values())):
        part = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        if kind == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return folder


def reference_logits(settings: dict[str, Any], tensors: Tensors, ids: torch.Tensor) -> torch.Tensor:
    """Logits of one text, ids of shape (T,), as float64 of shape (T, vocabulary)."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    second = settings["model_type"] == "internlm2"
    heads, width = settings["num_attention_heads"], settings["hidden_size"]
    kv_heads, head_dim = settings.get("num_key_value_heads", heads), width // heads
    x = weights["model.tok_embeddings.weight" if second else "model.embed_tokens.weight"][ids]
    turns = _turns(settings, len(ids), head_dim)
    for layer in range(settings["num_hidden_layers"]):

        def linear(name: str, x: torch.Tensor, layer: int = layer) -> torch.Tensor:
            name = f"model.layers.{layer}.{name}"
            return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

        def norm(name: str, x: torch.Tensor, layer: int = layer) -> torch.Tensor:
            return _rms_norm(x, weights[f"model.layers.{layer}.{name}.weight"], settings)

        normed = norm("attention_norm" if second else "input_layernorm", x)
        if second:
            groups = linear("attention.wqkv", normed).view(len(ids), kv_heads, heads // kv_heads + 2, head_dim)
            q, k, v = groups[:, :, :-2].reshape(len(ids), heads, head_dim), groups[:, :, -2], groups[:, :, -1]
        else:
            q, k, v = (linear(f"self_attn.{part}_proj", normed).view(len(ids), -1, head_dim) for part in "qkv")
        q, k = _rotated(q, *turns), _rotated(k, *turns)
        k, v = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / head_dim**0.5
        future = torch.ones(len(ids), len(ids)).triu(1).bool()
        attended = torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)
        x = x + linear("attention.wo" if second else "self_attn.o_proj", attended.reshape(len(ids), width))
        normed = norm("ffn_norm" if second else "post_attention_layernorm", x)
        gate, up, down = ("w1", "w3", "w2") if second else ("gate_proj", "up_proj", "down_proj")
        part = "feed_forward" if second else "mlp"
        hidden = torch.nn.functional.silu(linear(f"{part}.{gate}", normed)) * linear(f"{part}.{up}", normed)
        x = x + linear(f"{part}.{down}", hidden)
    x = _rms_norm(x, weights["model.norm.weight"], settings)
    return x @ weights["output.weight" if second else "lm_head.weight"].T


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + settings["rms_norm_eps"])


def _turns(settings: dict[str, Any], length: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    rotary = settings.get("rotary") or {}
    scaling = settings.get("rope_scaling") or rotary
    kind = scaling.get("type", scaling.get("rope_type"))
    base = rotary.get("base", settings.get("rope_theta"))
    factor = scaling.get("factor", scaling.get("scaling_factor", 1.0))
    longest = settings["max_position_embeddings"]
    if kind == "dynamic" and length > longest:
        base = base * (factor * length / longest - (factor - 1)) ** (head_dim / (head_dim - 2))
    positions = torch.arange(length).double() / (factor if kind == "linear" else 1)
    angles = torch.outer(positions, base ** -(torch.arange(0, head_dim, 2).double() / head_dim))
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
