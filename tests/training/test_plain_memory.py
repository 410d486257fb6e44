"""What is counted of a model's own layers against what autograd keeps of them, on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from live_bytes import SAMPLES, Tracker, attend
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from course_lib.data.collate import flatten
from course_lib.data.tokenize import Example
from course_lib.model_shape import LinearShape, ModelShape
from course_lib.recipe import LoraSettings, Recipe, make_recipe
from course_lib.training import attention
from course_lib.training.adapters import add_lora
from course_lib.training.loss import supervised_loss
from course_lib.training.memory_prediction import predict_memory
from course_lib.training.plain_memory import kept_by_layer

SHAPE = {"vocab_size": 97, "hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4}
CONFIGS = {
    "llama": (LlamaConfig, {"num_key_value_heads": 4}),
    "grouped": (LlamaConfig, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3Config, {"num_key_value_heads": 2, "head_dim": 32}),
}
TOKENS = 1024


class Dora(LoraSettings):
    """Adapters with magnitudes."""

    dora: bool = True


def with_magnitudes(model: Any, settings: LoraSettings) -> Any:
    lora = LoraConfig(r=settings.r, target_modules=settings.targets, task_type="CAUSAL_LM", use_dora=True)
    return get_peft_model(model, lora)


def kept(config: Any, recipe: Recipe, add: Callable[..., Any] = add_lora) -> int:
    """Bytes that are there between forward and backward."""
    dtype = getattr(torch, recipe.model.dtype)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    if recipe.lora:
        model = add(model, recipe.lora)
    (model.get_base_model() if recipe.lora else model).set_attn_implementation(attention.SEGMENTS)
    length = TOKENS // SAMPLES
    batch = flatten([Example([5] * length, [-100] * (length - 1) + [5]) for _ in range(SAMPLES)])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32), Tracker(before=0) as tracker:
        loss = supervised_loss(model.train(), batch)
        assert loss.requires_grad
        return tracker.alive()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    ("dtype", "lora"),
    [
        ("bfloat16", {"r": 4}),
        ("bfloat16", {"r": 4, "dtype": "bfloat16"}),
        ("bfloat16", {"r": 4, "dropout": 0.1}),
        ("bfloat16", {"r": 4, "targets": ["q_proj", "v_proj"]}),
        ("bfloat16", None),
        ("float32", {"r": 4}),
        ("float32", None),
    ],
)
def test_a_layer_keeps_what_is_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str, dtype: str, lora: dict[str, Any] | None
) -> None:
    monkeypatch.setattr(attention, "attend", attend)
    # as on a GPU, where the mask is kept in one byte
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: torch.native_dropout(x, self.p, True)[0])
    kind, more = CONFIGS[family]
    recipe = make_recipe({"model": {"name": "x", "dtype": dtype}, "lora": lora, "data": {"path": "x"}})
    one, three = (kept(kind(**SHAPE, **more, num_hidden_layers=layers), recipe) for layers in (1, 3))
    kind(**SHAPE, **more, num_hidden_layers=1).save_pretrained(tmp_path)
    a_token = (three - one) / 2 / (TOKENS // SAMPLES * SAMPLES)
    assert kept_by_layer(recipe, ModelShape.of(tmp_path)) == pytest.approx(a_token, rel=0.05)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dora_keeps_both_products(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(attention, "attend", attend)
    recipe = make_recipe({"model": {"name": "x", "dtype": dtype}, "data": {"path": "x"}})
    recipe.lora = Dora(r=4)
    kind, more = CONFIGS["llama"]
    one, three = (kept(kind(**SHAPE, **more, num_hidden_layers=layers), recipe, with_magnitudes) for layers in (1, 3))
    a_token = (three - one) / 2 / (TOKENS // SAMPLES * SAMPLES)
    shape = replace(ModelShape.of("tiny"), width=128, heads=4, kv_heads=4, head_dim=32, linears=linears(128, 352))
    assert kept_by_layer(recipe, shape) == pytest.approx(a_token, rel=0.05)
    predicted = predict_memory(recipe, shape)
    assert (predicted.engine, "DoRA" in predicted.reason) == ("plain", True)


def linears(width: int, inner: int) -> tuple[LinearShape, ...]:
    sizes = {"q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width)}
    mlp = {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
    return tuple(
        LinearShape(f"{part}.{name}_proj", *size)
        for part, group in (("self_attn", sizes), ("mlp", mlp))
        for name, size in group.items()
    )
