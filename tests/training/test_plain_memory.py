"""What is counted of a model's own layers against what autograd keeps of them, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from live_bytes import SAMPLES, Tracker, attend
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from course_lib.data.collate import flatten
from course_lib.data.tokenize import Example
from course_lib.model_shape import ModelShape
from course_lib.recipe import Recipe, make_recipe
from course_lib.training import attention
from course_lib.training.adapters import add_lora
from course_lib.training.loss import supervised_loss
from course_lib.training.plain_memory import kept_by_layer

SHAPE = {"vocab_size": 97, "hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4}
CONFIGS = {
    "llama": (LlamaConfig, {"num_key_value_heads": 4}),
    "grouped": (LlamaConfig, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3Config, {"num_key_value_heads": 2, "head_dim": 32}),
}
TOKENS = 1024


def kept(config: Any, recipe: Recipe) -> int:
    """Bytes that are there between forward and backward."""
    dtype = getattr(torch, recipe.model.dtype)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    if recipe.lora:
        model = add_lora(model, recipe.lora)
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
