from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from course_lib.errors import InputError
from course_lib.model_shape import ModelShape
from course_lib.models import catalogue

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def write(folder: Path, **keys: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(keys))
    return folder


@pytest.mark.parametrize("name", catalogue())
def test_a_model_of_the_catalogue_has_as_many_parameters_as_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COURSE_HOME", str(tmp_path))  # none of them is here
    said = catalogue()[name].parameters
    unit = {"K": 1e3, "M": 1e6, "B": 1e9}[said[-1]]
    digits = len(said[:-1].partition(".")[2])
    assert f"{ModelShape.of(name).parameters / unit:.{digits}f}{said[-1]}" == said


def test_the_tiny_model_has_the_shape_it_is_planned_with(tiny: Path) -> None:
    from dataclasses import replace

    assert replace(ModelShape.of(tiny), name="") == replace(ModelShape.of("tiny"), name="")


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
        LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
        MistralConfig(**SMALL, num_key_value_heads=2),
        Qwen2Config(**SMALL, num_key_value_heads=2),
        Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=32),
        GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=16),
        GPT2Config(vocab_size=97, n_embd=64, n_layer=3, n_head=4),
    ],
    ids=lambda config: config.model_type,
)
def test_the_shape_counts_the_parameters_and_linear_layers_of_the_model(config: Any, tmp_path: Path) -> None:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config)
    shape = ModelShape.of(tmp_path)
    assert shape.parameters == model.num_parameters()
    assert (shape.layers, shape.width, shape.vocabulary, shape.model_type) == (3, 64, 97, config.model_type)
    layer = next(module for module in model.modules() if isinstance(module, nn.ModuleList))[0]
    found = {
        name: module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    assert {linear.name: (linear.outputs, linear.inputs) for linear in shape.linears} == {
        name: tuple(size) for name, size in found.items()
    }
    assert {linear.name for linear in shape.linears if linear.bias} == {
        name for name, module in layer.named_modules() if name in found and module.bias is not None
    }


@pytest.mark.parametrize(
    ("keys", "biased"),
    [
        ({"model_type": "internlm"}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"model_type": "internlm", "bias": False}, set()),
        ({"model_type": "internlm2", "bias": False, "num_key_value_heads": 2}, set()),
        (
            {"model_type": "internlm3", "qkv_bias": True, "bias": True, "num_key_value_heads": 2, "head_dim": 16},
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
    ],
)
def test_an_internlm_has_the_shape_of_the_llama_it_loads_as(tmp_path: Path, keys: dict, biased: set[str]) -> None:
    from course_lib.internlm.model import register

    register()
    folder = write(tmp_path / "model", **SMALL, **keys)
    shape = ModelShape.of(folder)
    from transformers import AutoConfig

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert shape.parameters == model.num_parameters()
    assert {linear.name.split(".")[1] for linear in shape.linears if linear.bias} == biased
    assert shape.model_type == "llama"


@pytest.mark.parametrize(
    ("use", "window"), [({"sliding_window": 4096}, None), ({"sliding_window": 32, "use_sliding_window": True}, 32)]
)
def test_a_window_counts_where_it_is_used(tmp_path: Path, use: dict, window: int | None) -> None:
    assert ModelShape.of(write(tmp_path / "qwen", model_type="qwen2", **SMALL, **use)).window == window
    assert ModelShape.of(write(tmp_path / "mistral", model_type="mistral", **SMALL, sliding_window=9)).window == 9


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"model_type": "llama"}, "hidden_size is None"),
        ({"model_type": "llama", **SMALL, "vocab_size": "many"}, "vocab_size is 'many'"),
        ({"model_type": "llama", **SMALL, "num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"model_type": "llama", **SMALL, "num_key_value_heads": True}, "num_key_value_heads is True"),
        ({"model_type": "nonesuch"}, "no language model that can be planned"),
        ({}, "no language model that can be planned"),
    ],
)
def test_a_config_that_holds_no_decoder_is_told(tmp_path: Path, keys: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        ModelShape.of(write(tmp_path / "model", **keys))


def test_a_repository_that_is_not_here_is_to_be_fetched() -> None:
    with pytest.raises(InputError, match="run: course models fetch someone/a-model"):
        ModelShape.of("someone/a-model")
    with pytest.raises(InputError, match="did you mean qwen3-4b"):
        ModelShape.of("qwen3-4")
