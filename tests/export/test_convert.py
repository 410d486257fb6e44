"""course convert: the adapter computes what the trained model computed, and what cannot be converted is told in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_files import XTUNER_CONFIG, Tensors, write_xtuner, write_zero
from course_runner import Course
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from course_lib.adapter_record import base_fingerprint
from course_lib.errors import CourseError, InputError
from course_lib.export.convert import convert
from course_lib.export.merge import merge
from course_lib.models import load_model

IDS = torch.arange(3, 43).reshape(2, 20)
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def trained(tiny: Path) -> Callable[..., PeftModel]:
    """A peft model whose matrices are all random and large."""

    def make(**settings: Any) -> PeftModel:
        model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        lora = {"r": 4, "lora_alpha": 16, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings}
        model = get_peft_model(model, LoraConfig(**lora)).eval()
        torch.manual_seed(2)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        return model

    return make


def state_of(model: PeftModel, prefix: str = "llm.") -> Tensors:
    """What XTuner saves: everything trained, by its names."""
    return {f"{prefix}{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def settings_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def test_xtuners_pth_becomes_an_adapter(trained: Callable[..., PeftModel], tiny: Path, tmp_path: Path) -> None:
    model = trained()
    file = write_xtuner(tmp_path / "epoch_1.pth", state_of(model))
    converted = convert(file, tmp_path / "out", base="tiny")
    assert converted.summary() == "an adapter of 12 tensors, r = 4, alpha = 16, for tiny (shapes checked)"
    expected = {name: settings_in(tmp_path / "out")[name] for name in ("r", "lora_alpha", "target_modules", "bias")}
    assert expected == {"r": 4, "lora_alpha": 16, "target_modules": sorted(TARGETS), "bias": "none"}
    assert json.loads((tmp_path / "out" / "course.json").read_text()) == {
        "base": "tiny",
        "base_fingerprint": base_fingerprint(tiny),
        "dtype": "nf4",
        "double_quant": True,
        "compute_dtype": "float16",
        "template": "internlm_chat",
    }
    loaded, _ = load_model("tiny", dtype="float32", adapter=tmp_path / "out")
    with model.disable_adapter():
        assert largest(logits(loaded), logits(model)) > 0.3
    assert largest(logits(loaded), logits(model)) < 1e-5
    merge("tiny", tmp_path / "out", tmp_path / "merged")


def test_what_peft_would_have_saved(trained: Callable[..., PeftModel], tiny: Path, tmp_path: Path) -> None:
    """Also modules trained whole, an embedding's LoRA and DoRA's magnitudes."""
    settings = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "embed_tokens"], "use_dora": True}
    for number, lora in enumerate(({}, settings, {"rank_pattern": {"model.layers.1.self_attn.q_proj": 2}})):
        model = trained(**lora)
        model.save_pretrained(tmp_path / f"peft{number}", save_embedding_layers=False)
        file = write_xtuner(tmp_path / f"{number}.pth", state_of(model))
        convert(file, tmp_path / f"out{number}")
        saved, found = (load_file(tmp_path / f"{one}{number}" / "adapter_model.safetensors") for one in ("peft", "out"))
        assert saved.keys() == found.keys()
        assert all(torch.equal(saved[name], found[name]) for name in saved)
        base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, tmp_path / f"out{number}")
        assert largest(logits(loaded), logits(model)) < 1e-5


@pytest.mark.parametrize("prefix", ["", "llm.", "module.", "module.llm.", "_orig_mod."])
@pytest.mark.parametrize("form", ["whole", "without peft's prefix", "without the adapter's name", "named otherwise"])
def test_names_as_programs_write_them(
    prefix: str, form: str, trained: Callable[..., PeftModel], tmp_path: Path
) -> None:
    state = state_of(trained(), "")
    if form == "without peft's prefix":
        state = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    elif form != "whole":
        name = ".sft." if form == "named otherwise" else "."
        state = {key.replace(".default.", name): tensor for key, tensor in state.items()}
    file = write_xtuner(tmp_path / "a.pth", {prefix + name: tensor for name, tensor in state.items()})
    convert(file, tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    expected = {name.replace(".default", ""): tensor for name, tensor in state_of(trained(), "").items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("place", ["of XTuner", "with latest"])
def test_shards_become_an_adapter(
    stage: int, ranks: int, place: str, trained: Callable[..., PeftModel], tmp_path: Path
) -> None:
    model, beside = trained(), {}
    state = state_of(model, "llm." if place == "of XTuner" else "")
    folder = tmp_path / "epoch_1.pth"
    if place == "of XTuner":
        beside, shards = {"meta": {"cfg": XTUNER_CONFIG}}, folder
    else:
        shards = folder / "global_step3"
        folder.mkdir()
        (folder / "latest").write_text("global_step3")
    frozen = {"llm.base_model.model.model.norm.weight": torch.ones(64)}
    write_zero(shards, [state], stage=stage, ranks=ranks, frozen=frozen, **beside)
    convert(folder, tmp_path / "out", base="tiny", alpha=None if beside else 16)
    loaded, _ = load_model("tiny", dtype="float32", adapter=tmp_path / "out")
    assert largest(logits(loaded), logits(model)) < 1e-5


@pytest.mark.parametrize("source", ["pth", "stage 2", "stage 3"])
def test_all_weights_become_a_model(source: str, tiny: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    before = load_file(tiny / "model.safetensors")
    state = {f"llm.{name}": torch.randn(t.shape, generator=generator) / 8 for name, t in before.items()}
    path = tmp_path / "a.pth"
    if source == "pth":
        write_xtuner(path, {**state, "llm.lm_head.weight": state["llm.model.embed_tokens.weight"]}, config="")
    else:
        write_zero(path, [state], stage=int(source[-1]), ranks=2)
    with pytest.raises(InputError, match="holds all weights of a model and no LoRA; name its base with --base"):
        convert(path, tmp_path / "out")
    converted = convert(path, tmp_path / "out", base="tiny")
    assert converted.summary().startswith("a whole model of ")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, state[f"llm.{name}"].to(before[name].dtype))
        assert tensor.dtype == before[name].dtype
    load_model(tmp_path / "out", dtype="float32")
    absent = {name: tensor for name, tensor in state.items() if "norm" not in name}
    wrong = {
        "llm.model.layers.0.input_layernorm.weight, which": absent,
        "holds extra.weight, which": {**state, "llm.extra.weight": torch.ones(1)},
        "norm.weight is [65], and [64] in": {**state, "llm.model.norm.weight": torch.ones(65)},
    }
    for number, (said, some) in enumerate(wrong.items()):
        refused(said.removeprefix("llm."), write_xtuner(tmp_path / f"{number}.pth", some), tmp_path / "no", base="tiny")


def test_checkpoints_of_a_run_here(course: Course, tmp_path: Path) -> None:
    rows = [{"instruction": f"q{number}", "output": "yes"} for number in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    recipe = {
        "model": {"name": "tiny", "dtype": "float32"},
        "lora": {"r": 2, "alpha": 7},
        "data": {"path": "rows.json", "max_length": 128},
        "training": {"max_steps": 2, "checkpoint_every": 1},
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(recipe))
    assert course("train", "my.yaml", "--work-dir", "run").returncode == 0
    result = course("convert", "run/checkpoint-000002", "out")
    assert (result.returncode, result.stdout) == (0, "out\n"), result.stderr
    assert "r = 2, alpha = 7, for tiny (shapes checked)" in result.stderr
    for file in ("adapter_model.safetensors", "course.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "run" / "adapter" / file).read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "course.json")
    }
    # shards in the checkpoint go before the adapter beside them, and take its settings
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    half = {re.sub(r"(lora_[AB])", r"\1.default", name): tensor / 2 for name, tensor in saved.items()}
    write_zero(tmp_path / "run" / "checkpoint-000002" / "deepspeed", [half], stage=3, ranks=2)
    assert course("convert", "run/checkpoint-000002", "halved").returncode == 0
    halved = load_file(tmp_path / "halved" / "adapter_model.safetensors")
    assert all(torch.equal(halved[name], saved[name] / 2) for name in saved)
    assert settings_in(tmp_path / "halved") == settings_in(tmp_path / "out")
    one_line = "run: is no checkpoint, but holds 3; name one of them, such as run/"
    assert one_line in course("convert", "run", "no").stderr
    result = course("convert", "run/checkpoint-000001", "no", "--alpha", "8")
    assert "--alpha 8.0: adapter_config.json in run/checkpoint-000001 says 7" in result.stderr


def test_pefts_older_pickled_adapters(trained: Callable[..., PeftModel], tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path / "old")
    saved = load_file(tmp_path / "old" / "adapter_model.safetensors")
    torch.save(saved, tmp_path / "old" / "adapter_model.bin")
    (tmp_path / "old" / "adapter_model.safetensors").unlink()
    convert(tmp_path / "old", tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps({**settings_in(tmp_path / "out"), "r": 8}))
    refused("has rank 4, and adapter_config.json says r = 8", tmp_path / "old", tmp_path / "no")
    (tmp_path / "old" / "adapter_config.json").unlink()
    refused("has no adapter_config.json beside it", tmp_path / "old", tmp_path / "no")


def refused(said: str, checkpoint: Path, out: Path, **options: Any) -> None:
    with pytest.raises(InputError) as caught:
        convert(checkpoint, out, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_alpha_is_asked_for(trained: Callable[..., PeftModel], tmp_path: Path) -> None:
    state, out = state_of(trained()), tmp_path / "out"
    unsaid = write_xtuner(tmp_path / "unsaid.pth", state, config="a = 1")
    refused("does not say LoRA's alpha, and no weight does (r is 4); give it with --alpha", unsaid, out)
    other = write_xtuner(tmp_path / "other.pth", state, config=XTUNER_CONFIG.replace("r=4", "r=64"))
    refused("its config says r = 64, its matrices have 4; give alpha with --alpha", other, out)
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        refused(f"--alpha {alpha}: must be above 0", unsaid, out, alpha=alpha)
    convert(other, out, alpha=2.5)
    assert settings_in(out)["lora_alpha"] == 2.5
    convert(write_xtuner(tmp_path / "said.pth", state), tmp_path / "more", alpha=8)
    assert settings_in(tmp_path / "more")["lora_alpha"] == 8


def test_the_base(trained: Callable[..., PeftModel], tmp_path: Path) -> None:
    file = write_xtuner(tmp_path / "a.pth", state_of(trained()))
    converted = convert(file, tmp_path / "named by the config")
    assert "for internlm/internlm-chat-7b (not on this machine, so shapes were not checked)" in converted.summary()
    convert(file, tmp_path / "named", base="owner/name")
    assert settings_in(tmp_path / "named")["base_model_name_or_path"] == "owner/name"
    assert not (tmp_path / "named" / "course.json").exists()
    refused("'qwen2.5-7b-instrct' is unknown; did you mean", file, tmp_path / "no", base="qwen2.5-7b-instrct")
    refused("no such folder", file, tmp_path / "no", base="./absent")
    narrow = {name: tensor[:, :7] if "lora_A" in name else tensor for name, tensor in state_of(trained()).items()}
    refused("does not fit", write_xtuner(tmp_path / "b.pth", narrow), tmp_path / "no", base="tiny")


def test_checkpoints_that_are_not_whole(trained: Callable[..., PeftModel], tmp_path: Path) -> None:
    state, out = state_of(trained()), tmp_path / "out"
    name = "llm.base_model.model.model.layers.1.mlp.down_proj.lora_{}.default.weight"
    a, b, module = name.format("A"), name.format("B"), "model.layers.1.mlp.down_proj"

    def changed(**tensors: Any) -> Path:
        kept = {key: tensor for key, tensor in state.items() if key not in (a, b)}
        return write_xtuner(tmp_path / "a.pth", {**kept, **{name.format(key): tensors[key] for key in tensors}})

    refused(f"has only LoRA's A of {module}", changed(A=state[a]), out)
    refused(f"has only LoRA's B of {module}", changed(B=state[b]), out)
    refused(
        f"matrices of {module} do not go together: A is [4, 128], B [64, 3]",
        changed(A=state[a], B=state[b][:, :3]),
        out,
    )
    refused("do not go together: A is [512]", changed(A=state[a].flatten(), B=state[b]), out)
    refused("do not go together: A is [0, 128], B [64, 0]", changed(A=state[a][:0], B=state[b][:, :0]), out)
    two = {**state, **{key.replace("default", "second"): tensor for key, tensor in state.items()}}
    refused("holds 2 adapters (default, second)", write_xtuner(tmp_path / "b.pth", two), out)
    sees = {**state, "visual_encoder.x.lora_A.default.weight": torch.ones(1)}
    refused("of a model that sees", write_xtuner(tmp_path / "c.pth", sees), out)
    biased = {**state, "llm.base_model.model.model.layers.1.mlp.down_proj.bias": torch.ones(64)}
    file = write_xtuner(tmp_path / "d.pth", biased, config=XTUNER_CONFIG.replace("bias='none'", "bias='lora_only'"))
    refused("down_proj.bias was trained beside LoRA", file, out)
    write_zero(tmp_path / "zero", [biased], stage=2, ranks=2, meta={"cfg": XTUNER_CONFIG})
    refused("down_proj.bias was trained beside LoRA", tmp_path / "zero", out)
    assert "1 other tensors left out" in convert(write_xtuner(tmp_path / "e.pth", biased), out).summary()


def test_what_is_no_checkpoint(course: Course, tmp_path: Path) -> None:
    def told(said: str, *arguments: str) -> None:
        result = course("convert", *arguments)
        assert (result.returncode, result.stdout) == (2, ""), result.stderr
        assert said in result.stderr
        assert result.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()

    told("absent.pth: no such file or folder", "absent.pth", "out")
    (tmp_path / "empty").mkdir()
    told("empty: holds no checkpoint: neither DeepSpeed's", "empty", "out")
    torch.save({"meta": {}, "state_dict": {}, "other": 1}, tmp_path / "a.pth")
    told("a.pth: holds no weights of a model (but no names)", "a.pth", "out")
    torch.save([1, 2], tmp_path / "b.pth")
    told("b.pth: holds no weights of a model", "b.pth", "out")
    torch.save({"x": 1}, tmp_path / "c.pth")
    told("c.pth: holds no weights of a model (but x)", "c.pth", "out")
    (tmp_path / "d.pth").write_bytes((tmp_path / "c.pth").read_bytes()[:300])
    told("d.pth: is damaged or was not copied whole", "d.pth", "out")
    (tmp_path / "mp_rank_00_model_states.pt").write_bytes(b"x")
    told("is one file of several; name the folder it is in", "mp_rank_00_model_states.pt", "out")
    told("c.pth: already exists", "a.pth", "c.pth")
    (tmp_path / "ia3").mkdir()
    (tmp_path / "ia3" / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    torch.save({"base_model.model.x.ia3_l": torch.ones(1)}, tmp_path / "ia3" / "adapter_model.bin")
    told("ia3: is an adapter of type IA3; only LoRA is converted", "ia3", "out")
    told("File name too long", "x" * 300, "out")


def test_a_disk_that_fills_up(
    trained: Callable[..., PeftModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    file = write_xtuner(tmp_path / "a.pth", state_of(trained()))
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CourseError, match="the disk is full"):
        convert(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
