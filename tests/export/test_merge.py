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

from course_lib.adapter_record import base_fingerprint
from course_lib.errors import CourseError, InputError
from course_lib.export.merge import merge
from course_lib.models import load_model

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.arange(3, 43).reshape(2, 20)
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


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
            torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim == 2 else torch.nn.init.uniform_(
                parameter, 0.5, 1
            )
        folder = tmp_path / name
        shutil.copytree(tiny, folder)
        (folder / "model.safetensors").unlink()
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
        return folder

    return make


def make_adapter(
    base: Path, folder: Path, *, record: dict[str, Any] | None = None, std: float = 0.2, **settings: Any
) -> Path:
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
    """(2, 20, vocabulary). Quantised models run as in training: in eval mode bitsandbytes rounds to bfloat16 on CPUs that have it."""
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
    "patterns": (
        {},
        {"rank_pattern": {"q_proj": 8, "0.mlp.up_proj": 2}, "alpha_pattern": {"v_proj": 32, "1.mlp.*": 3}},
    ),
    "trained biases": ({"attention_bias": True}, {"bias": "all"}),
    "biases of adapted layers": ({"attention_bias": True}, {"bias": "lora_only"}),
    "lora bias": ({"attention_bias": True}, {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]}),
    "head and norms trained whole": ({}, {"modules_to_save": ["lm_head", "input_layernorm"]}),
    "embedding and head": ({}, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "one layer only": ({}, {"layers_to_transform": [1]}),
    "fan_in_fan_out on linear layers": ({}, {"fan_in_fan_out": True}),
    "rank 1": ({}, {"r": 1}),
    "dora": ({"tie_word_embeddings": True}, {"use_dora": True}),
    "dora and rslora, biased": ({"attention_bias": True, "mlp_bias": True}, {"use_dora": True, "use_rslora": True}),
    "dora on the embedding and the head": (
        {},
        {"use_dora": True, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    ),
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


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("settings", [{"tie_word_embeddings": True}, {"attention_bias": True, "dtype": torch.bfloat16}])
def test_adapter_on_nf4_merges_into_the_dequantised_weights(
    double_quant: bool, settings: dict[str, Any], variant: Callable[..., Path], tmp_path: Path
) -> None:
    base = variant(**settings)
    record = {"dtype": "nf4", "double_quant": double_quant}
    adapter = make_adapter(base, tmp_path / "adapter", record=record, target_modules=["q_proj", "v_proj", "down_proj"])
    merged = merge(base, adapter, tmp_path / "merged", dtype="float32")
    expected = logits(base, dtype="nf4", adapter=adapter, double_quant=double_quant)
    assert largest(expected, logits(merged)) < 1e-3
    assert (
        largest(expected, logits(base, adapter=adapter)) > 0.1
    )  # what merging into the unquantised weights would give
    assert largest(expected, logits(base, dtype="nf4", double_quant=double_quant)) > 0.5


@pytest.mark.parametrize("dtype", ["nf4", "int8"])
def test_dora_on_a_quantised_base_gives_rows_of_the_quantised_weights_their_lengths(
    dtype: str, variant: Callable[..., Path], tmp_path: Path
) -> None:
    base = variant(attention_bias=True)
    adapter = make_adapter(base, tmp_path / "adapter", record={"dtype": dtype}, use_dora=True, std=0.5)
    merged = merge(base, adapter, tmp_path / "merged", dtype="float32")
    expected = logits(base, dtype=dtype, adapter=adapter)
    assert largest(expected, logits(base, dtype=dtype)) > 1
    # a CPU computes int8 from its rounded weights alone; a GPU would round the inputs too
    assert largest(expected, logits(merged)) < 1e-3
    lengths = {name: tensor for name, tensor in tensors(adapter).items() if "magnitude" in name}
    assert len(lengths) == 14
    for name, magnitude in lengths.items():
        module = name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
        assert largest(tensors(merged)[f"{module}.weight"].norm(dim=1), magnitude.abs()) < 1e-4


@pytest.mark.parametrize("compute_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("dtype", ["nf4", "int8"])
def test_every_layer_that_was_quantised_is_merged_as_it_was_loaded(
    dtype: str, compute_dtype: str | None, variant: Callable[..., Path], tmp_path: Path
) -> None:
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    base = variant()
    record = {"dtype": dtype, "compute_dtype": compute_dtype}
    adapter = make_adapter(base, tmp_path / "adapter", record=record, target_modules=["q_proj"])
    merged, plain = tensors(merge(base, adapter, tmp_path / "merged")), tensors(base)
    model, _ = load_model(base, dtype=dtype, device="cpu", compute_dtype=compute_dtype)
    quantised = {
        name: module for name, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)
    }
    assert len(quantised) == 14
    for name in plain:
        layer = quantised.get(name.removesuffix(".weight"))
        if "q_proj" in name or layer is None:
            assert ("q_proj" in name) != torch.equal(merged[name], plain[name])
        elif dtype == "nf4":
            loaded = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert torch.equal(merged[name], loaded.float())
        else:
            assert torch.equal(merged[name], functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB))


def test_adapter_on_int8_is_nearer_to_the_merged_model_than_its_own_effect(
    variant: Callable[..., Path], tmp_path: Path
) -> None:
    """int8 layers round their inputs too, so logits agree only roughly; the weights are compared above."""
    base = variant()
    adapter = make_adapter(base, tmp_path / "adapter", record={"dtype": "int8"})
    expected = logits(base, dtype="int8", adapter=adapter)
    assert largest(expected, logits(merge(base, adapter, tmp_path / "merged"))) < 0.4
    assert largest(expected, logits(base)) > 1


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "nf4"])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_conv1d_and_missing_prefix(dora: bool, dtype: str, prefix: str, tiny: Path, tmp_path: Path) -> None:
    """GPT-2 keeps its weights as (in, out); its checkpoint on the Hub names them without the model's own prefix."""
    from safetensors.torch import save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    torch.manual_seed(1)
    shape = {"vocab_size": 259, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = GPT2Config(**shape, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)  # logits() runs nf4 models in training mode
    GPT2LMHeadModel(config).save_pretrained(base)
    named = {name.replace("transformer.", prefix): tensor for name, tensor in tensors(base).items()}
    save_file(named, base / "model.safetensors", metadata={"format": "pt"})
    targets = ["c_attn", "c_proj", "c_fc"]  # attn.c_proj is square: its shape does not tell the order
    settings = {"target_modules": targets, "fan_in_fan_out": True, "use_dora": dora}
    adapter = make_adapter(base, tmp_path / "adapter", record={"dtype": dtype}, **settings)
    merged = merge(base, adapter, tmp_path / "merged")
    expected = logits(base, dtype=dtype, adapter=adapter)
    assert largest(expected, logits(base)) > 0.5
    assert largest(expected, logits(merged)) < (1e-4 if dtype == "float32" else 1e-3)
    assert tensors(merged).keys() == named.keys()


def test_tied_embeddings_survive(variant: Callable[..., Path], tmp_path: Path) -> None:
    base = variant(tie_word_embeddings=True)
    merged = merge(base, make_adapter(base, tmp_path / "adapter"), tmp_path / "merged")
    model, _ = load_model(merged, dtype="float32", device="cpu")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tensors(merged).keys() == tensors(base).keys()
    assert "lm_head.weight" not in tensors(merged)
    shutil.copytree(merged, tmp_path / "again")
    model.save_pretrained(tmp_path / "again")
    assert largest(logits(merged), logits(tmp_path / "again")) == 0.0


@pytest.mark.parametrize(("size", "files"), [("60KB", None), (60_000, None), ("2GB", 1), ("0.1 MiB", None), (1, 21)])
def test_shards(size: str | int, files: int | None, variant: Callable[..., Path], tmp_path: Path) -> None:
    base = variant()
    adapter = make_adapter(base, tmp_path / "adapter")
    steps: list[tuple[int, int]] = []
    merged = merge(base, adapter, tmp_path / "merged", max_shard_size=size, progress=lambda *step: steps.append(step))
    shards = sorted(merged.glob("*.safetensors"))
    assert (merged / "model.safetensors.index.json").exists() == (len(shards) > 1)
    assert len(shards) == files if files else len(shards) > 3
    largest_tensor = 259 * 64 * 4
    limit = {"60KB": 60_000, 60_000: 60_000, "2GB": 2e9, "0.1 MiB": 0.1 * 2**20, 1: 1}[size]
    assert all(shard.stat().st_size < max(limit, largest_tensor) + 4000 for shard in shards)
    if len(shards) > 1:
        index = json.loads((merged / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {shard.name for shard in shards}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(merged).values())
    total = sum(tensor.nbytes for tensor in tensors(merged).values())
    assert steps[-1] == (total, total)
    assert [done for done, _ in steps] == sorted({done for done, _ in steps})
    assert largest(logits(base, adapter=adapter), logits(merged)) < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_output_dtype(dtype: str, variant: Callable[..., Path], tmp_path: Path) -> None:
    base = variant(dtype=torch.bfloat16)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    adapter = make_adapter(variant("plain", dtype=torch.bfloat16), tmp_path / "adapter")
    merged = merge(base, adapter, tmp_path / "merged", dtype=dtype)
    expected = "bfloat16" if dtype == "auto" else dtype
    assert {tensor.dtype for tensor in tensors(merged).values()} == {getattr(torch, expected)}
    assert json.loads((merged / "config.json").read_text()) == {**config, "dtype": expected}


def test_tokenizer_template_and_settings_come_along(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    (base / "LICENSE").write_text("Apache-2.0")
    (base / "README.md").write_text("# the base")
    adapter = make_adapter(base, tmp_path / "adapter", record={"dtype": "auto"})
    merged = merge(base, adapter, tmp_path / "merged")
    kept = {file.name for file in base.iterdir()} - {"README.md", "source.json"}
    assert {file.name for file in merged.iterdir()} == kept
    for name in kept - {"config.json", "model.safetensors"}:
        assert (merged / name).read_bytes() == (base / name).read_bytes()
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (merged, base))
    chat = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "hello"}]
    assert ours.chat_template == theirs.chat_template
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)


def test_a_full_disk_leaves_the_earlier_model_whole(
    variant: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    base = variant()
    adapter = make_adapter(base, tmp_path / "adapter")
    merged = merge(base, adapter, tmp_path / "out" / "merged")
    before = {file.name: file.read_bytes() for file in merged.iterdir()}
    save_file, calls = safetensors.torch.save_file, []

    def full(*arguments: Any, **settings: Any) -> None:
        calls.append(1)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(*arguments, **settings)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(CourseError, match="disk is full") as caught:
        merge(base, adapter, merged, overwrite=True, max_shard_size="50KB")
    assert caught.value.exit_code == 1
    assert len(calls) == 3
    assert {file.name: file.read_bytes() for file in merged.iterdir()} == before
    assert [file.name for file in merged.parent.iterdir()] == ["merged"]
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
    with pytest.raises(CourseError, match="disk is full"):
        merge(base, adapter, merged, overwrite=True)
    assert {file.name: file.read_bytes() for file in merged.iterdir()} == before


def test_overwrite_replaces_the_earlier_model(variant: Callable[..., Path], tmp_path: Path) -> None:
    base = variant()
    adapter = make_adapter(base, tmp_path / "adapter")
    merged = merge(base, adapter, tmp_path / "merged", max_shard_size="50KB")
    merge(base, adapter, merged, overwrite=True)
    assert [file.name for file in merged.glob("model*")] == ["model.safetensors"]


def write_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"use_qalora": True}, "use_qalora"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
    ],
)
def test_adapters_that_are_not_plain_lora_are_refused_by_kind(
    setting: dict[str, Any], named: str, variant: Callable[..., Path], tmp_path: Path
) -> None:
    base = variant()
    adapter = make_adapter(base, tmp_path / "adapter")
    write_json(adapter / "adapter_config.json", **setting)
    with pytest.raises(InputError, match=named):
        merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("tied", "settings", "named"),
    [
        (True, {"target_modules": ["q_proj", "lm_head"]}, "lm_head.weight.*shares"),
        (True, {"target_modules": ["embed_tokens"]}, "embed_tokens.weight.*shares"),
        (True, {"modules_to_save": ["embed_tokens"]}, "embed_tokens.weight.*shares"),
    ],
)
def test_tied_embeddings_cannot_be_adapted(
    tied: bool, settings: dict[str, Any], named: str, variant: Callable[..., Path], tmp_path: Path
) -> None:
    base = variant(tie_word_embeddings=tied)
    adapter = make_adapter(base, tmp_path / "adapter", record={"dtype": "float32"}, **settings)
    with pytest.raises(InputError, match=named):
        merge(base, adapter, tmp_path / "merged")


def rewrite_adapter(adapter: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    from safetensors.torch import save_file

    save_file(change(tensors(adapter)), adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda named: {name.replace("q_proj", "query"): tensor for name, tensor in named.items()}, "no such tensor"),
        (lambda named: {name: tensor for name, tensor in named.items() if "lora_B" not in name}, "only one of the two"),
        (
            lambda named: {name: torch.ones(4, 32) if "lora_A" in name else each for name, each in named.items()},
            "shape",
        ),
        (lambda named: named | {"base_model.model.lm_head.weight": torch.ones(300, 64)}, r"\[300, 64\].*vocabulary"),
        (lambda named: named | {"base_model.model.model.extra": torch.ones(3)}, "model.extra"),
        (
            lambda named: named | {f"{Q_PROJ}.lora_magnitude_vector": torch.ones(64)},
            "a DoRA magnitude and no such LoRA",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    change: Callable[..., Any], named: str, variant: Callable[..., Path], tmp_path: Path
) -> None:
    base = variant()
    adapter = make_adapter(base, tmp_path / "adapter", record={"dtype": "float32"}, target_modules=["q_proj"])
    rewrite_adapter(adapter, change)
    with pytest.raises(InputError, match=named):
        merge(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda named: {name: each for name, each in named.items() if "magnitude" not in name}, "no DoRA magnitude"),
        (lambda named: named | {f"{Q_PROJ}.lora_magnitude_vector": torch.ones(63)}, r"shape \[63, 64\]"),
        (
            lambda named: {name: each for name, each in named.items() if "lora_A" not in name},
            "only one of the two|no such",
        ),
    ],
)
def test_dora_with_parts_missing_is_refused(
    change: Callable[..., Any], named: str, variant: Callable[..., Path], tmp_path: Path
) -> None:
    base = variant()
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], use_dora=True)
    rewrite_adapter(adapter, change)
    with pytest.raises(InputError, match=named):
        merge(base, adapter, tmp_path / "merged")


def test_adapter_of_another_base_is_refused_first(variant: Callable[..., Path], tmp_path: Path) -> None:
    base, other = variant(), variant("other")
    adapter = make_adapter(base, tmp_path / "adapter", record={"dtype": "float32", "base_fingerprint": "0" * 16})
    with pytest.raises(InputError, match="trained on"):
        merge(other, adapter, tmp_path / "merged", dtype="float99")


def test_damaged_numbers_are_not_written(variant: Callable[..., Path], tmp_path: Path) -> None:
    base = variant()
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    rewrite_adapter(adapter, lambda named: {name: tensor * 1e3 for name, tensor in named.items()})
    with pytest.raises(CourseError, match=r"q_proj.weight: not finite after merging as torch.float16"):
        merge(base, adapter, tmp_path / "merged", dtype="float16")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("size", ["nonsense", "", "0", "-1GB", "2 XB", 0, "1e9", None, True])
def test_wrong_shard_sizes_are_refused(size: Any, variant: Callable[..., Path], tmp_path: Path) -> None:
    base = variant()
    with pytest.raises(InputError, match="max_shard_size"):
        merge(base, make_adapter(base, tmp_path / "adapter"), tmp_path / "merged", max_shard_size=size)


def test_wrong_outputs_are_refused(
    variant: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = variant("work/base")
    adapter = make_adapter(base, tmp_path / "work" / "adapter")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("three years")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(base)
    refused = {
        "overlaps": ["work/base", "work/base/merged", "work/adapter", "work/adapter/x/y", "work", ".", "link"],
        "no model folder": ["taken", "file"],
    }
    monkeypatch.chdir(tmp_path)
    for reason, names in refused.items():
        for name in names:
            with pytest.raises(InputError, match=reason):
                merge(base, adapter, name, overwrite=True)
    with pytest.raises(InputError, match="already exists"):
        merge(base, adapter, "taken")
    with pytest.raises(InputError, match="dtype 'fp8' is unknown"):
        merge(base, adapter, "merged", dtype="fp8")
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "three years"
    assert merge(base, adapter, "merged") == Path("merged")


def test_bases_that_cannot_be_read_are_refused(variant: Callable[..., Path], tmp_path: Path) -> None:
    base = variant()
    adapter = make_adapter(base, tmp_path / "adapter", record={"dtype": "float32"})
    torn = tmp_path / "torn"
    shutil.copytree(base, torn)
    (torn / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no"):
        merge(torn, adapter, tmp_path / "merged")
    torch.save(tensors(base), torn / "pytorch_model.bin")
    (torn / "pytorch_model.bin").write_bytes((torn / "pytorch_model.bin").read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot be read as pickled weights|is damaged"):
        merge(torn, adapter, tmp_path / "merged")
    packed = tmp_path / "packed"
    shutil.copytree(base, packed)
    write_json(packed / "config.json", quantization_config={"quant_method": "gptq"})
    from safetensors.torch import save_file

    save_file(
        tensors(base) | {"model.layers.0.qweight": torch.ones(4, dtype=torch.int32)}, packed / "model.safetensors"
    )
    with pytest.raises(InputError, match="quantised"):
        merge(packed, adapter, tmp_path / "merged")
    with pytest.raises(InputError, match="no such folder"):
        merge(base, tmp_path / "nothing", tmp_path / "merged")


def test_a_pickled_base_merges(variant: Callable[..., Path], tmp_path: Path) -> None:
    """In two files, one tensor under two names: what a tied model's state dict is."""
    base = variant(tie_word_embeddings=True)
    adapter = make_adapter(base, tmp_path / "adapter", record={"dtype": "nf4"})
    expected = logits(merge(base, adapter, tmp_path / "merged"))
    state = tensors(base)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    (base / "model.safetensors").unlink()
    files = {name: f"pytorch_model-{1 + ('layers' in name)}-of-2.bin" for name in state}
    for file in set(files.values()):
        torch.save({name: tensor for name, tensor in state.items() if files[name] == file}, base / file)
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    merged = merge(base, adapter, tmp_path / "merged2")
    assert set(tensors(merged)) == set(state)
    assert torch.equal(logits(merged), expected)


def test_a_model_whose_code_is_in_its_folder(variant: Callable[..., Path], tmp_path: Path) -> None:
    """Without its code a plain adapter merges; which layers bitsandbytes quantised cannot be known."""
    base = variant(tie_word_embeddings=True)
    adapter = make_adapter(base, tmp_path / "adapter", record={"dtype": "float32"})
    expected, config = logits(base, adapter=adapter), (base / "config.json").read_text()
    remote = {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}, "model_type": "course_x"}
    write_json(base / "config.json", **remote)
    fingerprint = base_fingerprint(base)
    write_json(adapter / "course.json", base_fingerprint=fingerprint)
    merged = merge(base, adapter, tmp_path / "merged")
    (merged / "config.json").write_text(config)
    assert largest(expected, logits(merged)) < 1e-4
    write_json(adapter / "course.json", dtype="nf4")
    with pytest.raises(InputError, match="trust_remote_code"):
        merge(base, adapter, tmp_path / "merged2")
    head = make_adapter(variant("plain", tie_word_embeddings=True), tmp_path / "head", target_modules=["embed_tokens"])
    (head / "course.json").write_text(json.dumps({"base_fingerprint": fingerprint, "dtype": "float32"}))
    with pytest.raises(InputError, match="shares"):
        merge(base, head, tmp_path / "merged2")


def test_a_named_template_goes_along_into_the_merged_model(tiny: Path, tmp_path: Path) -> None:
    """A base served with another template than its adapter was trained with would answer in the wrong form."""
    from transformers import AutoTokenizer

    from course_lib.data.templates import named_template

    adapter = make_adapter(tiny, tmp_path / "adapter", record={"dtype": "float32", "template": "chatml"})
    merged = merge(tiny, adapter, tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(merged).chat_template == named_template("chatml").source


def test_the_protocol_of_an_agent_goes_along_into_the_merged_model(tiny: Path, tmp_path: Path) -> None:
    from course_lib.adapter_record import recorded_protocol

    adapter = make_adapter(tiny, tmp_path / "adapter", record={"dtype": "float32", "protocol": "react_brief"})
    assert recorded_protocol(str(merge(tiny, adapter, tmp_path / "merged"))) == "react_brief"
    plain = make_adapter(tiny, tmp_path / "plain", record={"dtype": "float32", "protocol": "auto"})
    assert not (merge(tiny, plain, tmp_path / "merged_plain") / "course.json").exists()
