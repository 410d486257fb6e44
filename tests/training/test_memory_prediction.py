"""Predicted memory against what was measured on a GPU, and against tensors counted on a CPU."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, LlamaConfig, Qwen3Config

from course_lib.errors import InputError
from course_lib.model_shape import ModelShape
from course_lib.recipe import Recipe, make_recipe
from course_lib.training.adapters import add_lora
from course_lib.training.fused import FusedEngine, why_not_fused
from course_lib.training.memory_parts import fused_lasting, pinned
from course_lib.training.memory_prediction import PARTS, _predict_plain, predict_memory, why_plain
from course_lib.training.optimizer import make_optimizer

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu_training.json"
MEASURED = json.loads(RESULTS.read_text())["settings"]
HOST = ("embedding", "head", "checkpoints", "layers")
SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
INTERNLM_7B = ModelShape.of("internlm-7b")


def recipe(**sections: Any) -> Recipe:
    content = {"model": {"name": "x"}, "data": {"path": "x"}, **sections}
    return make_recipe(content)


def recipe_of(setting: str) -> Recipe:
    """The recipe of a benchmark's setting, such as nf4:1:512:checkpoint:head."""
    dtype, rows, length, *more = setting.split(":")
    again = [match[1] for part in more if (match := re.fullmatch(r"checkpoint(\d*)", part))]
    return recipe(
        model={"name": "x", "dtype": dtype},
        lora={"r": 64, "dtype": "bfloat16" if "adapters16" in more else "float32"},
        data={"path": "x", "max_length": int(length)},
        training={
            "batch_size": int(rows),
            "optimizer": "adamw_8bit",
            "gradient_checkpointing": bool(again) and (int(again[0]) if again[0] else True),
            "offload": [part for part in HOST if part in more],
        },
    )


@pytest.mark.parametrize("setting", [name for name, sides in MEASURED.items() if "peak_gb" in sides.get("ours", {})])
def test_the_peak_on_a_gpu_is_foretold(setting: str) -> None:
    """Within 1 %, though 5 % were asked for: what is left is the allocator's choice of blocks."""
    measured, predicted = MEASURED[setting]["ours"], predict_memory(recipe_of(setting), INTERNLM_7B)
    assert predicted.engine == "fused"
    assert predicted.peak / 1e9 == pytest.approx(measured["peak_gb"], rel=0.01)
    if "resident_gb" in measured:
        assert predicted.resident / 1e9 == pytest.approx(measured["resident_gb"], rel=0.01)


@pytest.mark.parametrize(
    "setting",
    [name for name, sides in MEASURED.items() if "peak_gb" in sides.get("peft", {})],
)
def test_the_peak_of_the_models_own_layers_is_estimated(setting: str) -> None:
    """The measured side has transformers' loss and attention, not those of PlainEngine: the same count but for details."""
    predicted = _predict_plain(recipe_of(setting), INTERNLM_7B, 1, 0, "as measured")
    assert predicted.peak / 1e9 == pytest.approx(MEASURED[setting]["peft"]["peak_gb"], rel=0.05)


@pytest.mark.parametrize("rank_type", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["bfloat16", "nf4"])
def test_what_lasts_is_what_the_engine_holds(tmp_path: Path, dtype: str, rank_type: str) -> None:
    """Every tensor of model, engine and optimizer on a CPU, in bytes as they are: without an allocator's rounding."""
    config = LlamaConfig(
        vocab_size=301, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    asked = recipe(
        model={"name": "x", "dtype": dtype, "compute_dtype": "bfloat16" if dtype == "nf4" else "auto"},
        lora={"r": 8, "dtype": rank_type},
        training={"optimizer": "adamw_8bit"},
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=nf4 if dtype == "nf4" else None, device_map="cpu"
    )
    assert asked.lora is not None
    model = add_lora(model, asked.lora)
    engine = FusedEngine(model, checkpoint=False)
    optimizer = make_optimizer(engine.trainable, asked.training)
    optimizer.step()
    shape = ModelShape.of(tmp_path)
    tensors = [*model.parameters(), *(state for p in engine.trainable for state in optimizer.state[p].values())]
    for flat in engine.flat:
        tensors += [flat.master, flat.master.grad, flat.compute]
    for layer in engine.layers:
        for group in layer.groups:
            tensors += [*group.frozen.tensors, group.frozen.bias, getattr(group, "owner", None)]
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in tensors
        if isinstance(tensor, torch.Tensor)
    }
    lasting = fused_lasting(asked, shape)
    counted = lasting.parts.total() - lasting.parts["workspace"]
    assert counted == pytest.approx(sum(storages.values()), rel=0.02)


@pytest.mark.parametrize(
    ("sections", "kind", "said"),
    [
        ({}, "llama", ""),
        ({"lora": None}, "llama", "full fine-tuning"),
        ({}, "qwen3", ""),
        ({}, "gpt2", "gpt2 has layers of another shape"),
        ({"model": {"name": "x", "dtype": "float16"}}, "llama", "float16"),
        ({"lora": {"targets": ["q_proj", "lm_head"]}}, "llama", "lm_head has an adapter"),
        (
            {"model": {"name": "x", "dtype": "float32"}, "lora": {"targets": ["q_proj", "embed_tokens"]}},
            "llama",
            "embed",
        ),
    ],
)
def test_the_engine_is_foretold(tmp_path: Path, sections: dict[str, Any], kind: str, said: str) -> None:
    config = {
        "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
        "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16),
        "gpt2": GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4),
    }[kind]
    config.save_pretrained(tmp_path)
    asked, shape = recipe(**sections), ModelShape.of(tmp_path)
    assert why_plain(asked, shape) == said if not said else said in why_plain(asked, shape)
    dtype = getattr(torch, asked.model.dtype) if asked.model.dtype != "auto" else torch.bfloat16
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    if asked.lora:
        targets = asked.lora.targets
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    assert bool(why_not_fused(model)) == bool(said)
    assert predict_memory(asked, shape).engine == ("plain" if said else "fused")


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": {"name": "x", "dtype": "int8"}}, "Linear8bitLt"),
        ({"model": {"name": "x", "dtype": "nf4"}}, "no whole number of quantisation blocks"),
        ({"data": {"path": "x", "max_length": 64}}, "rows are padded"),
    ],
)
def test_what_only_a_gpu_or_a_run_would_show(sections: dict[str, Any], said: str) -> None:
    shape = replace(ModelShape.of("tiny"), window=32)
    assert said in why_plain(recipe(**{"data": {"path": "x", "max_length": 16}, **sections}), shape)


def test_the_parts_sum_to_the_peak_and_come_in_their_order() -> None:
    for asked in (recipe_of("nf4:1:512"), recipe(lora=None), recipe(model={"name": "x", "dtype": "int8"})):
        predicted = predict_memory(asked, INTERNLM_7B)
        assert tuple(predicted.parts) == PARTS
        assert predicted.peak == sum(predicted.parts.values()) <= predicted.needed - 500 * 10**6
        assert min(predicted.parts.values()) >= 0


def changed(asked: str, other: str) -> dict[str, int]:
    """By how much each part of the second setting is larger."""
    one, two = (predict_memory(recipe_of(setting), INTERNLM_7B) for setting in (asked, other))
    return {name: two.parts[name] - one.parts[name] for name in PARTS if two.parts[name] != one.parts[name]}


def test_each_lever_moves_its_own_parts() -> None:
    table = 103168 * 4096 * 2
    assert changed("nf4:1:512:checkpoint", "nf4:1:512:checkpoint:embedding") == {
        "embedding": pytest.approx(-table, 0.01)
    }
    assert changed("nf4:1:512:checkpoint", "nf4:1:512:checkpoint:head")["head"] == pytest.approx(-table, 0.01)
    assert changed("nf4:2:512", "nf4:2:512:checkpoint")["activations"] < -1.4e9
    adapters = changed("nf4:1:512:checkpoint", "nf4:1:512:checkpoint:adapters16")
    assert set(adapters) == {"adapters", "gradients"}
    assert adapters["gradients"] == pytest.approx(-320e6, 0.01)
    streamed = changed("nf4:1:512:checkpoint", "nf4:1:512:checkpoint:layers")
    assert streamed["weights"] == pytest.approx(-3.39e9, 0.01)
    assert streamed["workspace"] == pytest.approx(2 * 104.5e6, 0.01)


def test_more_checkpointed_layers_never_take_more() -> None:
    peaks = [predict_memory(recipe_of(f"nf4:2:2048:checkpoint{n}"), INTERNLM_7B).peak for n in range(1, 32)]
    assert peaks == sorted(peaks, reverse=True)
    whole = predict_memory(recipe_of("nf4:2:2048:checkpoint"), INTERNLM_7B).peak
    assert whole == peaks[-1] < predict_memory(recipe_of("nf4:2:2048"), INTERNLM_7B).peak


@pytest.mark.parametrize(
    ("optimizer", "lora_type", "a_parameter"),
    [("adamw", "float32", 8), ("adamw", "bfloat16", 4), ("adamw_8bit", "float32", 2 + 8 / 256)],
)
def test_an_optimizer_has_its_bytes_a_parameter(optimizer: str, lora_type: str, a_parameter: float) -> None:
    asked = recipe(lora={"r": 64, "dtype": lora_type}, training={"optimizer": optimizer})
    trained = 159_907_840
    assert predict_memory(asked, INTERNLM_7B).parts["optimizer"] == pytest.approx(a_parameter * trained, rel=0.01)


def test_paged_states_are_in_host_memory() -> None:
    asked = recipe(lora={"r": 64}, training={"optimizer": "paged_adamw"})
    predicted = predict_memory(asked, INTERNLM_7B)
    assert (predicted.parts["optimizer"], predicted.host) == (0, pytest.approx(8 * 159_907_840, rel=0.01))


def test_pinned_memory_comes_in_powers_of_two() -> None:
    assert [pinned(size) for size in (1, 2, 3, 2**20, 2**20 + 1)] == [1, 2, 4, 2**20, 2**21]


def test_shared_layers_are_a_part_on_each_gpu() -> None:
    asked = recipe_of("nf4:1:512:checkpoint")
    whole = predict_memory(asked, INTERNLM_7B, gpus=4)
    shared = predict_memory(asked, INTERNLM_7B, gpus=4, shard=True)
    assert whole.parts == predict_memory(asked, INTERNLM_7B).parts
    assert whole.libraries > predict_memory(asked, INTERNLM_7B).libraries
    assert shared.parts["weights"] == pytest.approx(whole.parts["weights"] / 4, rel=0.02)
    with pytest.raises(InputError, match="--fsdp needs the fused layers.*full fine-tuning"):
        predict_memory(recipe(lora=None), INTERNLM_7B, gpus=4, shard=True)


def test_a_target_that_is_no_layer_is_told() -> None:
    with pytest.raises(InputError, match="'q_prj' is no linear layer of llama.*did you mean q_proj"):
        predict_memory(recipe(lora={"targets": ["v_proj", "q_prj"]}), INTERNLM_7B)
