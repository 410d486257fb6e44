"""InternLM checkpoints in every number format, merged, trained and saved, beside the published architecture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import random_tensors, reference_logits, save_checkpoint
from safetensors.torch import load_file

from course_lib.data.templates import choose_template
from course_lib.data.tokenize import encode_conversation
from course_lib.errors import InputError
from course_lib.export.merge import merge
from course_lib.internlm.layout import layout_of
from course_lib.models import load_model, load_tokenizer
from course_lib.recipe import LoraSettings, make_recipe
from course_lib.training.adapters import add_lora
from course_lib.training.fused import why_not_fused
from course_lib.training.listeners import read_metrics
from course_lib.training.loop import train

FAMILIES = ["internlm", "internlm2", "internlm3"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(4, 24)  # within max_position_embeddings
LONG = torch.arange(4, 64)


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids[None]).logits[0].double()


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


# Loading


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("ids", [IDS, LONG], ids=["short", "long"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("internlm", {}),
        ("internlm", {"bias": False, "rotary": {"base": 5000, "type": "origin"}}),
        ("internlm", {"rotary": {"base": 10000, "type": "dynamic", "scaling_factor": 2.0}}),
        ("internlm2", {}),
        ("internlm2", {"bias": True, "rope_scaling": None}),
        ("internlm2", {"num_key_value_heads": 8, "rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("internlm2", {"num_key_value_heads": 1}),
        ("internlm3", {}),
    ],
)
def test_logits_are_those_of_the_published_architecture(
    family: str, changes: dict, ids: torch.Tensor, kind: str, tmp_path: Path, checkpoint: Callable[..., Path]
) -> None:
    folder = checkpoint(family, kind=kind, **changes)
    model, _ = load_model(folder, dtype="float32")
    assert model.config.model_type == "llama"
    config = settings(folder)
    expected = reference_logits(config, random_tensors(config), ids)
    assert expected.abs().max() > 1
    assert largest(logits(model, ids), expected) < 1e-5


def test_a_key_that_is_missing_has_the_codes_default(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("internlm")
    expected = logits(load_model(folder)[0], LONG)
    config = settings(folder)
    del config["rotary"], config["bias"]
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load_model(folder)[0], LONG), expected)


def test_a_texts_rotation_does_not_depend_on_the_texts_before(checkpoint: Callable[..., Path]) -> None:
    model, _ = load_model(checkpoint("internlm2"))
    fresh = {length: logits(model, LONG[:length]) for length in (20, 30, 60)}
    for length in (60, 30, 20, 30, 60):
        assert torch.equal(logits(model, LONG[:length]), fresh[length])


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_holds_the_rounded_weights(family: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(family, kind="bin")
    model, _ = load_model(folder, dtype="bfloat16")
    whole, _ = load_model(folder, dtype="float32")
    state = model.state_dict()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(state[name], tensor.bfloat16()), name


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["nf4", "int8"])
def test_quantised_on_the_way_in_as_the_llama_would_be(
    dtype: str, family: str, kind: str, checkpoint: Callable[..., Path]
) -> None:
    from bitsandbytes import functional

    folder = checkpoint(family, kind=kind)
    model, _ = load_model(folder, dtype=dtype, compute_dtype="float32")
    whole, _ = load_model(folder, dtype="float32")
    for name in (f"model.layers.1.{part}" for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")):
        weight, loaded = whole.get_submodule(name).weight.data, model.get_submodule(name).weight
        if dtype == "nf4":
            packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            assert torch.equal(loaded.data, packed)
            assert torch.equal(loaded.quant_state.absmax, state.absmax)
        else:
            packed, scales, _ = functional.int8_vectorwise_quant(weight.half())
            assert torch.equal(loaded.data, packed)
            assert torch.equal(loaded.SCB, scales)
    assert type(model.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "nf4"])
def test_the_fused_layers_apply(family: str, dtype: str, checkpoint: Callable[..., Path]) -> None:
    # widths such that every matrix is a whole number of quantisation blocks
    model, _ = load_model(checkpoint(family, hidden_size=256, intermediate_size=512, head_dim=32), dtype=dtype)
    assert why_not_fused(add_lora(model, LoraSettings(r=2))) == ""


# Wrong input


def without(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = settings(folder)
        tensors = {key: tensor for key, tensor in random_tensors(config).items() if key != name}
        save_checkpoint(folder, config, tensors)

    return spoil


def with_rows(rows: int) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = settings(folder)
        tensors = random_tensors(config)
        tensors["model.layers.1.attention.wqkv.weight"] = torch.zeros(rows, 64)
        save_checkpoint(folder, config, tensors)

    return spoil


def with_settings(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({**settings(folder), **changes}))

    return spoil


def cut_off(folder: Path) -> None:
    file = sorted(folder.glob("*-of-00002.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without("model.layers.1.attention.wqkv.weight"), r"layers\.1\.attention\.wqkv\.weight is missing"),
        (without("model.layers.0.feed_forward.w2.weight"), r"feed_forward\.w2\.weight is missing"),
        (without("output.weight"), r"tensor output\.weight is missing"),
        (with_rows(95), r"1\.attention\.wqkv\.weight has 95 rows, which are not those of 12 heads"),
        (with_rows(84), r"self_attn\.k_proj\.weight is \[14, 64\], and by config.json \[16, 64\]"),
        (with_settings(num_key_value_heads=3), "num_key_value_heads 3 in config.json are no heads in groups"),
        (with_settings(rope_scaling={"type": "yarn", "factor": 2.0}), "type 'yarn' is unknown"),
        (with_settings(bias=True), r"attention\.wqkv\.bias is missing|attention\.wo\.bias is missing"),
        (cut_off, "00002.safetensors: is damaged"),
    ],
)
def test_a_damaged_folder_is_told_in_one_line(spoil: Any, words: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("internlm2")
    spoil(folder)
    with pytest.raises(InputError, match=words) as raised:
        load_model(folder, dtype="float32")
    assert "\n" not in str(raised.value)


def test_an_internlm3_that_is_no_llama_is_refused(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="qkv_bias True makes it no Llama"):
        load_model(checkpoint("internlm3", qkv_bias=True))


def test_a_reward_model_is_not_taken_for_a_language_model(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="InternLM2ForRewardModel is no InternLM2ForCausalLM"):
        load_model(checkpoint("internlm2", architectures=["InternLM2ForRewardModel"]))


# Training, merging, saving


def adapter_of(folder: Path, out: Path, dtype: str = "float32", **lora: Any) -> Path:
    """An adapter under Llama's names, whose matrices are all random and large."""
    from peft import LoraConfig, get_peft_model

    from course_lib.adapter_record import base_fingerprint

    model, _ = load_model(folder)
    config = {"r": 3, "lora_alpha": 5, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(model, LoraConfig(**config))
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(out)
    record = {"base": str(folder), "base_fingerprint": base_fingerprint(folder), "dtype": dtype, "double_quant": True}
    (out / "course.json").write_text(json.dumps(record))
    return out


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "nf4", "int8"])
def test_merging_writes_the_original_names_and_places(
    dtype: str, family: str, kind: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint(family, kind=kind)
    adapter = adapter_of(folder, tmp_path / "adapter", dtype)
    model, _ = load_model(folder, dtype=dtype, adapter=adapter, compute_dtype="float32")
    # in eval mode bitsandbytes rounds to bfloat16 on CPUs that have it
    expected = model.train()(IDS[None]).logits[0].detach().double()
    merged = merge(folder, adapter, tmp_path / "merged", max_shard_size="40KB")
    config, before, after = settings(folder), random_tensors(settings(folder)), read(merged)
    assert settings(merged) == config
    assert {name: tensor.shape for name, tensor in after.items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    assert largest(reference_logits(config, after, IDS), expected) < 1e-4
    assert largest(logits(load_model(merged)[0]), expected) < 1e-4
    assert largest(reference_logits(config, before, IDS), expected) > 0.5
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "layers" in name and before[name].ndim == 2}
    assert (merged / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_merging_touches_only_the_rows_that_were_trained(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("internlm2")
    adapter = adapter_of(folder, tmp_path / "adapter", target_modules=["k_proj"])
    merged, before = read(merge(folder, adapter, tmp_path / "merged")), random_tensors(settings(folder))
    for name, tensor in before.items():
        changed = (merged[name] != tensor).reshape(len(tensor), -1).any(1)
        if "wqkv" in name:  # by head, of 8 rows: 4 queries, key, value; twice
            assert changed.view(12, 8).any(1).nonzero().flatten().tolist() == [4, 10]
        else:
            assert not changed.any()


ROW = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "你好 world"}]}


def two_steps(folder: Path, lora: dict[str, int] | None, **training: Any) -> Any:
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join([json.dumps(ROW)] * 4))
    steps = {"batch_size": 2, "lr": 5e-3, "max_steps": 2, "epochs": 4, **training}
    data = {"path": str(rows), "max_length": 256, "packing": "none"}
    return make_recipe(
        {"model": {"name": str(folder), "dtype": "float32"}, "lora": lora, "data": data, "training": steps}
    )


def reference_loss(folder: Path) -> float:
    """The mean cross entropy of the row's trained tokens before any training."""
    tokenizer = load_tokenizer(folder)
    example = encode_conversation(ROW, choose_template(tokenizer), tokenizer)
    config = settings(folder)
    predicted = reference_logits(config, random_tensors(config), torch.tensor(example.input_ids))[:-1]
    return torch.nn.functional.cross_entropy(predicted, torch.tensor(example.labels[1:])).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_of_two_steps(family: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint(family)
    adapter = train(two_steps(folder, {"r": 4, "alpha": 8}), work_dir=tmp_path / "run")
    losses = [event["loss"] for event in read_metrics(tmp_path / "run") if event["event"] == "StepDone"]
    assert losses[0] == pytest.approx(reference_loss(folder), rel=1e-4)
    assert losses[1] < losses[0]
    model, _ = load_model(folder, adapter=adapter)
    expected = logits(model)
    assert largest(expected, logits(load_model(folder)[0])) > 1e-4
    merged = merge(folder, adapter, tmp_path / "merged")
    assert largest(reference_logits(settings(folder), read(merged), IDS), expected) < 1e-4
    other = checkpoint(family, "other", seed=1)
    with pytest.raises(InputError, match="was trained on"):
        load_model(other, adapter=adapter)


def test_a_run_on_all_weights_goes_on_from_its_checkpoint(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("internlm2")
    whole = train(two_steps(folder, None, checkpoint_every=1), work_dir=tmp_path / "run")
    expected, first = read(whole), tmp_path / "run" / "checkpoint-000001"
    assert set(expected) == set(random_tensors(settings(folder)))
    shutil.rmtree(tmp_path / "run" / "checkpoint-000002")
    assert first.is_dir()
    again = read(train(two_steps(folder, None, checkpoint_every=1), work_dir=tmp_path / "run", resume=True))
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_trained_whole_is_saved_under_the_original_names(
    family: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint(family, "base")
    model, _ = load_model(folder, dtype="float32")
    model.save_pretrained(tmp_path / "saved")
    before, after = random_tensors(settings(folder)), read(tmp_path / "saved")
    before.pop("model.layers.0.self_attn.rotary_emb.inv_freq", None)  # computed, not trained
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    old, new = settings(folder), settings(tmp_path / "saved")
    written = ("model_type", "architectures", "auto_map", "bias", "rope_theta", "rope_scaling", "num_attention_heads")
    assert {key: new.get(key) for key in written} == {key: old.get(key) for key in written}
    assert not {"attention_bias", "rope_parameters"} & set(new)
    shutil.copy(folder / "tokenizer.model", tmp_path / "saved")
    assert torch.equal(logits(load_model(tmp_path / "saved")[0], LONG), logits(load_model(folder)[0], LONG))


def test_names_and_rows_go_there_and_back(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("internlm2")
    layout, tensors = layout_of(folder), random_tensors(settings(folder))
    names = [name for stored in tensors for name in layout.names(stored)]
    assert len(names) == len(set(names)) == len(tensors) + 2 * 2
    for stored, tensor in tensors.items():
        assert {layout.stored_name(name) for name in layout.names(stored)} == {stored}
        parts = layout.split(stored, tensor)
        assert [list(part.shape) for part in parts] == layout.shapes(stored, list(tensor.shape))
        assert torch.equal(layout.join(stored, parts), tensor)
