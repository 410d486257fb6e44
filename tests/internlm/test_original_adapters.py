"""Adapters of InternLM2 for its own module names and for Llama's: both compute what W + s B A says, by the published architecture."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from course_runner import Course
from peft import LoraConfig, get_peft_model
from reference import random_tensors, reference_logits
from safetensors.torch import load_file, save_file
from torch import nn

from course_lib.adapter_record import check_adapter
from course_lib.errors import InputError
from course_lib.export.convert import convert
from course_lib.export.merge import merge
from course_lib.internlm.adapter import export_original
from course_lib.models import load_model

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ORIGINAL = ["wqkv", "wo", "w1", "w2", "w3"]
IDS = torch.arange(4, 24)


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model, _ = load_model(folder, dtype="float32", adapter=adapter)
    with torch.inference_mode():
        return model(IDS[None]).logits[0].double()


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def randomise(model: nn.Module) -> None:
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)


def llama_adapter(base: Path, folder: Path, **lora: Any) -> Path:
    """What a training here writes: an adapter on the Llama, under Llama's names."""
    model, _ = load_model(base, dtype="float32")
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": LLAMA, "task_type": "CAUSAL_LM", **lora})
    model = get_peft_model(model, config)
    randomise(model)
    model.save_pretrained(folder)
    return folder


def original_adapter(base: Path, folder: Path, **lora: Any) -> Path:
    """What a training elsewhere writes: peft over modules with the names of the code on the Hub."""

    class Stack(nn.Module):
        def prepare_inputs_for_generation(self) -> None:
            """Peft wants a causal language model to have it."""

    whole = Stack()
    for name, tensor in random_tensors(settings(base)).items():
        *path, last, _ = name.split(".")
        parent: nn.Module = whole
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        if "tok_embeddings" in name:
            parent.add_module(last, nn.Embedding(*tensor.shape))
        elif tensor.ndim == 2:
            parent.add_module(last, nn.Linear(tensor.shape[1], tensor.shape[0], bias=False))
    config = {"r": 3, "lora_alpha": 5, "target_modules": ORIGINAL, "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(whole, LoraConfig(**config))
    randomise(model)
    model.save_pretrained(folder)
    return folder


def by_hand(base: Path, adapter: Path) -> torch.Tensor:
    """The logits of W + s B A, for an adapter under the names of the checkpoint; scalings by peft's rules for plain names."""
    lora, weights = json.loads((adapter / "adapter_config.json").read_text()), random_tensors(settings(base))
    saved = load_file(adapter / "adapter_model.safetensors")
    for key, tensor in saved.items():
        module = key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
        if ".lora_A" in key or "lora_embedding_A" in key:

            def setting(patterns: str, default: str, module: str = module) -> float:
                found = (value for name, value in lora[patterns].items() if re.match(rf"(.*\.)?({name})$", module))
                return next(found, lora[default])

            other = saved[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
            rank, alpha = setting("rank_pattern", "r"), setting("alpha_pattern", "lora_alpha")
            assert len(tensor) == rank
            change = (other @ tensor) * (alpha / (math.sqrt(rank) if lora["use_rslora"] else rank))
            whole = weights[f"{module}.weight"] + (change.T if "embedding" in key else change)
            if (magnitude := saved.get(f"base_model.model.{module}.lora_magnitude_vector")) is not None:
                whole = (magnitude / whole.norm(dim=1)).unsqueeze(1) * whole
            weights[f"{module}.weight"] = whole
        elif ".lora_" not in key:
            weights[key.removeprefix("base_model.model.")] = tensor
    return reference_logits(settings(base), weights, IDS)


CASES: dict[str, dict[str, Any]] = {
    "all linear": {},
    "rslora": {"use_rslora": True},
    "q and v alone": {"target_modules": ["q_proj", "v_proj"]},
    "no attention": {"target_modules": ["gate_proj", "down_proj"]},
    "one layer": {"layers_to_transform": [1]},
    "patterns": {"rank_pattern": {"k_proj": 1, "0.self_attn.v_proj": 5}, "alpha_pattern": {"q_proj": 7, "up_proj": 2}},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "a head and norms trained whole": {"modules_to_save": ["lm_head", "input_layernorm"]},
    "dora": {"use_dora": True},
    "dora and patterns": {"use_dora": True, "rank_pattern": {"k_proj": 1}, "alpha_pattern": {"q_proj": 7}},
}


@pytest.mark.parametrize("heads", [{}, {"num_key_value_heads": 8}])
@pytest.mark.parametrize("case", CASES)
def test_an_exported_adapter_computes_the_same(
    case: str, heads: dict[str, int], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = checkpoint("internlm2", **heads)
    adapter = llama_adapter(base, tmp_path / "adapter", **CASES[case])
    expected = logits(base, adapter)
    original = export_original(adapter, tmp_path / "original", base=base)
    assert largest(logits(base), expected) > 0.3
    assert largest(by_hand(base, original), expected) < 1e-4
    assert largest(logits(base, original), expected) < 1e-4
    assert largest(logits(merge(base, original, tmp_path / "merged")), expected) < 1e-4
    names = {key.rsplit(".lora_", 1)[0].rsplit(".", 1)[-1] for key in load_file(original / "adapter_model.safetensors")}
    assert not names & {*LLAMA, "lm_head", "embed_tokens"}
    assert export_original(original, tmp_path / "again", base=base)
    assert largest(logits(base, tmp_path / "again"), expected) < 1e-4


def test_its_settings_name_modules_shortly(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    base = checkpoint("internlm2")
    original = export_original(llama_adapter(base, tmp_path / "adapter"), tmp_path / "original", base=base)
    lora = json.loads((original / "adapter_config.json").read_text())
    assert lora["target_modules"] == ["w1", "w2", "w3", "wo", "wqkv"]
    assert (lora["r"], lora["lora_alpha"]) == (3, 5)
    assert (lora["rank_pattern"], lora["alpha_pattern"]) == ({"wqkv": 9}, {"wqkv": 15})


ELSEWHERE: dict[str, dict[str, Any]] = {
    "all linear": {},
    "wqkv": {"target_modules": ["wqkv"]},
    "by a pattern": {"target_modules": r".*\.0\.(attention|feed_forward)\.(wqkv|w2)"},
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"wqkv": 5}, "alpha_pattern": {"1.attention.wqkv": 9}},
    "head and embedding": {"target_modules": ["wqkv", "output", "tok_embeddings"]},
    "a head trained whole": {"modules_to_save": ["output"]},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_an_adapter_trained_elsewhere_loads_and_merges(
    case: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = checkpoint("internlm2", kind="bin")
    adapter = original_adapter(base, tmp_path / "adapter", **ELSEWHERE[case])
    expected = by_hand(base, adapter)
    assert largest(logits(base), expected) > 0.1
    check_adapter(adapter, base)
    assert largest(logits(base, adapter), expected) < 1e-4
    merged = merge(base, adapter, tmp_path / "merged")
    assert largest(logits(merged), expected) < 1e-4
    assert json.loads((merged / "config.json").read_text()) == settings(base)


def test_of_another_shape_it_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    adapter = original_adapter(checkpoint("internlm2", "one"), tmp_path / "adapter")
    for changes in ({"num_key_value_heads": 4}, {"intermediate_size": 128}):
        with pytest.raises(InputError, match="does not fit"):
            load_model(checkpoint("internlm2", "other", **changes), adapter=adapter)


def test_a_checkpoint_of_xtuner_on_internlm2_converts(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """It keeps the names of the code it was trained with, and loads here as any adapter under them."""
    base = checkpoint("internlm2")
    trained = original_adapter(base, tmp_path / "trained")
    saved = load_file(trained / "adapter_model.safetensors")
    state = {"llm." + re.sub("(lora_[AB])", r"\1.default", key): tensor for key, tensor in saved.items()}
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "epoch_1.pth")
    convert(tmp_path / "epoch_1.pth", tmp_path / "out", alpha=5, base=base)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found.keys() == saved.keys()
    lora = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (lora["r"], lora["target_modules"]) == (3, sorted(ORIGINAL))
    expected = by_hand(base, trained)
    assert largest(logits(base), expected) > 0.3
    assert largest(logits(base, tmp_path / "out"), expected) < 1e-4
    assert largest(logits(merge(base, tmp_path / "out", tmp_path / "merged")), expected) < 1e-4


@pytest.mark.parametrize("family", ["internlm", "internlm3"])
def test_under_llamas_names_an_adapter_stays_as_it_is(
    family: str, checkpoint: Callable[..., Path], tmp_path: Path, course: Course
) -> None:
    base = checkpoint(family)
    adapter = llama_adapter(base, tmp_path / "adapter", use_dora=True)
    result = course("export", "original", str(adapter), str(tmp_path / "out"))
    assert (result.returncode, result.stdout) == (0, f"{tmp_path / 'out'}\n")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_what_cannot_be_exported_is_told(
    tiny: Path, checkpoint: Callable[..., Path], tmp_path: Path, course: Course
) -> None:
    base = checkpoint("internlm2")
    adapter = llama_adapter(base, tmp_path / "adapter")
    with pytest.raises(InputError, match="does not fit"):
        export_original(adapter, tmp_path / "out", base=tiny)
    with pytest.raises(InputError, match="only LoRA and DoRA have a form"):
        export_original(llama_adapter(base, tmp_path / "bias", lora_bias=True), tmp_path / "out", base=base)
    some = llama_adapter(base, tmp_path / "some", use_dora=True, target_modules=["q_proj", "v_proj"])
    with pytest.raises(InputError, match=r"is DoRA on .*q_proj and has none on .*k_proj: .*wqkv is one matrix"):
        export_original(some, tmp_path / "out", base=base)
    plain = tmp_path / "plain"
    shutil.copytree(adapter, plain)
    state = load_file(plain / "adapter_model.safetensors")
    save_file({key: tensor for key, tensor in state.items() if "0.mlp.up_proj.lora_A" not in key}, plain / "x")
    (plain / "x").rename(plain / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"only one of the two LoRA matrices for model\.layers\.0\.mlp\.up_proj"):
        export_original(plain, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    result = course("export", "original", str(adapter), str(tmp_path / "out"))
    assert (result.returncode, "already exists" in result.stderr) == (2, True)
    lora = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**lora, "base_model_name_or_path": None}))
    result = course("export", "original", str(adapter), str(tmp_path / "new"))
    assert (result.returncode, "--base" in result.stderr) == (2, True)
    other = tmp_path / "llama"
    (other / "x").mkdir(parents=True)
    model, _ = load_model(tiny, dtype="float32")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(other)
    with pytest.raises(InputError, match="is no InternLM but of type llama"):
        export_original(other, tmp_path / "new", base=tiny)
