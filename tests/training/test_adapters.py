"""Variants of adapters: each trains, resumes bit-identical, and is saved as an adapter that anyone's peft loads on the unchanged base."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from course_lib.data.tokenize import Example
from course_lib.errors import CourseError, InputError
from course_lib.export.merge import merge
from course_lib.models import load_model
from course_lib.recipe import LoraSettings, ModelSettings, TrainingSettings
from course_lib.training import initialisation
from course_lib.training.adapters import add_lora, load_weights, save_weights
from course_lib.training.events import HeldOutLoss, RunStarted, StepDone
from course_lib.training.listeners import read_metrics
from course_lib.training.loop import train
from course_lib.training.optimizer import make_optimizer, make_schedule, parameter_groups
from course_lib.training.run import prepare_run

IDS = torch.arange(5, 45).reshape(2, 20)
VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "pissa in bfloat16": {"init": "pissa", "dtype": "bfloat16"},
    "olora": {"init": "olora", "rslora": True},
    "eva": {"init": "eva"},
    "lora+": {"lr_ratio": 16},
    "all at once": {"init": "pissa", "dora": True, "rslora": True, "lr_ratio": 4},
}
CHANGING = ["pissa", "pissa in bfloat16", "olora", "all at once"]


def adapted(folder: Path, variant: str = "", *, seed: int = 0, **settings: Any) -> PeftModel:
    """The model of a folder with adapters of a variant."""
    torch.manual_seed(seed)
    model, _ = load_model(folder, dtype="float32")
    lora = LoraSettings(**{"r": 4, "alpha": 6, **VARIANTS.get(variant, {}), **settings})
    return add_lora(model, lora, examples=examples(), seed=seed)


def examples(count: int = 20, *, vocabulary: int = 250, trained: int = 20) -> list[Example]:
    torch.manual_seed(3)
    rows = torch.randint(vocabulary, (count, 30)).tolist()
    return [Example(row, [-100] * (30 - trained) + row[30 - trained :]) for row in rows]


def layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """Layers with an adapter, by their names in the base."""
    return ((name, module) for name, module in model.base_model.model.named_modules() if isinstance(module, LoraLayer))


def tolerance(variant: str) -> float:
    """For logits around 0.1: peft multiplies with adapters in bfloat16 in bfloat16."""
    return 5e-3 if "bfloat16" in variant else 1e-4


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def moved(model: PeftModel) -> PeftModel:
    """Adapters as if trained: every trainable tensor is another."""
    torch.manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter) * parameter.abs().mean().clamp(min=0.05)
    return model


def losses(work_dir: Path) -> list[float]:
    return [event["loss"] for event in read_metrics(work_dir) if event["event"] == "StepDone"]


def saved(model: PeftModel, folder: Path, base: Path) -> Path:
    folder.mkdir()
    save_weights(model, folder, base_folder=base, settings=ModelSettings(name="tiny", dtype="float32"), protocol="auto")
    return folder


@pytest.mark.parametrize("init", ["pissa", "olora", "eva"])
def test_a_rank_above_that_of_a_layer_is_refused(tiny: Path, init: str) -> None:
    with pytest.raises(InputError, match=rf"lora\.init = {init} needs lora\.r of at most 32, the rank of .*k_proj"):
        adapted(tiny, init=init, r=33)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_weights_that_cannot_be_changed_are_refused(tiny: Path, init: str) -> None:
    settings = LoraSettings(r=2, init=init, targets=["lm_head"])
    tied = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=1, tie_word_embeddings=True
    )
    with pytest.raises(InputError, match="lm_head shares its own with the embedding"):
        add_lora(AutoModelForCausalLM.from_config(tied), settings)
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2))
    with pytest.raises(InputError, match=r"c_attn is a Conv1D of torch\.float32; set lora\.init to eva or default"):
        add_lora(model, LoraSettings(r=2, init=init))
    quantised, _ = load_model(tiny, dtype="nf4")
    with pytest.raises(InputError, match="q_proj is a Linear4bit"):
        add_lora(quantised, LoraSettings(r=2, init=init))


def test_eva_wants_trained_tokens_enough_and_different_enough(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_model(tiny, dtype="float32")
    settings = LoraSettings(r=8, init="eva")
    with pytest.raises(InputError, match=r"needs lora\.r = 8 trained tokens or more, and 3 rows have 6"):
        add_lora(model, settings, examples=examples(3, trained=2))
    model, _ = load_model(tiny, dtype="float32")
    with pytest.raises(InputError, match="0 rows have 0"):
        add_lora(model, settings)
    model, _ = load_model(tiny, dtype="float32")
    monkeypatch.setattr(initialisation, "EVA_PASSES", 2)  # as if no pass found what the one before did
    with pytest.raises(InputError, match=r"finds no lora\.r = 8 directions in the 400 trained tokens of 20 rows"):
        add_lora(model, settings, examples=examples())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_computes_at_the_start_what_its_base_does(tiny: Path, variant: str) -> None:
    base, _ = load_model(tiny, dtype="float32")
    model = adapted(tiny, variant)
    assert largest(logits(model), logits(base)) < tolerance(variant)
    for name, layer in layers(model):
        scaling = 3 if VARIANTS[variant].get("rslora") else 1.5
        product = scaling * layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
        assert (product.abs().max() > 1e-3) == (variant in CHANGING)
        assert largest(layer.get_base_layer().weight + product, base.get_submodule(name).weight) < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_it_fits_the_unchanged_base_in_anyones_peft(tiny: Path, tmp_path: Path, variant: str) -> None:
    model = moved(adapted(tiny, variant))
    adapter = saved(model, tmp_path / "adapter", tiny)
    base, _ = load_model(tiny, dtype="float32")
    expected = logits(model)
    assert largest(expected, logits(base)) > 0.02  # the adapter matters
    ours, _ = load_model(tiny, dtype="float32", adapter=adapter)
    assert largest(logits(ours), expected) < tolerance(variant)
    theirs = PeftModel.from_pretrained(base, str(adapter))
    assert largest(logits(theirs), expected) < tolerance(variant)
    merged, _ = load_model(merge(tiny, adapter, tmp_path / "merged", dtype="float32"), dtype="float32")
    assert largest(logits(merged), expected) < tolerance(variant)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["r"] == (8 if variant in CHANGING else 4)
    assert {file.name for file in adapter.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "course.json",
    }


def test_on_a_bfloat16_base_what_is_taken_out_costs_no_more_than_rounding(tiny: Path, tmp_path: Path) -> None:
    model, _ = load_model(tiny, dtype="bfloat16")
    exact, _ = load_model(tiny, dtype="float32")
    model = moved(add_lora(model, LoraSettings(r=4, alpha=6, init="pissa")))
    adapter = saved(model, tmp_path / "adapter", tiny)
    loaded = PeftModel.from_pretrained(exact, str(adapter))
    rounded, _ = load_model(tiny, dtype="bfloat16", adapter=adapter)
    by_rounding = largest(logits(rounded), logits(loaded))
    assert largest(logits(model), logits(loaded)) < 3 * by_rounding


def test_pissa_is_the_largest_part_of_the_weight_and_olora_its_qr(tiny: Path) -> None:
    model, _ = load_model(tiny, dtype="float32")
    weight = model.model.layers[1].mlp.up_proj.weight
    u, s, vh = torch.linalg.svd(weight.data, full_matrices=False)
    s[:4] *= 10  # a random matrix has no largest part to speak of
    weight.data = u * s @ vh
    expected = {"pissa": u[:, :4] * s[:4] @ vh[:4]}
    q, r = torch.linalg.qr(weight.data)
    expected["olora"] = 1.5 * q[:, :4] @ r[:4]
    for init, part in expected.items():
        other = copy.deepcopy(model)
        layer = add_lora(other, LoraSettings(r=4, alpha=6, init=init)).base_model.model.model.layers[1].mlp.up_proj
        assert largest(1.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight, part) < 1e-5
        assert largest(layer.get_base_layer().weight, weight - part) < 1e-5


def test_eva_is_where_activations_vary_most(tiny: Path) -> None:
    model = adapted(tiny, "eva")
    base, _ = load_model(tiny, dtype="float32")
    inputs: list[torch.Tensor] = []
    base.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, given, __: inputs.append(given[0].detach()))
    base(torch.tensor([example.input_ids for example in examples()]))
    seen = inputs[0][:, 10:].flatten(0, 1)  # trained tokens alone
    seen = seen - seen.mean(0)
    most = torch.linalg.svdvals(seen)[:4].square().sum()
    a = model.base_model.model.model.layers[1].mlp.down_proj.lora_A["default"].weight.data
    assert largest(a @ a.T, torch.eye(4)) < 1e-4
    assert 0.97 * most < (seen @ a.T).square().sum() < 1.0001 * most
    plain = adapted(tiny).base_model.model.model.layers[1].mlp.down_proj.lora_A["default"].weight.data
    assert (seen @ torch.linalg.qr(plain.T)[0]).square().sum() < 0.7 * most


def test_eva_looks_at_a_bounded_number_of_examples_chosen_by_the_seed(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(seed: int) -> list[list[int]]:
        return [example.input_ids for example in initialisation._some(examples(400), tokens=200, seed=seed)]

    assert chosen(0) == chosen(0) != chosen(1)
    assert len(chosen(0)) == 10
    monkeypatch.setattr(initialisation, "EVA_POSITIONS", 100)
    assert len(chosen(0)) == 3
    monkeypatch.undo()
    one, two = (adapted(tiny, "eva", seed=5).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("init", ["dora", "eva"])
def test_variants_on_quantised_bases(make: Any, tmp_path: Path, init: str) -> None:
    for dtype in ("nf4", "int8"):
        work_dir = tmp_path / dtype
        adapter = train(make(model={"dtype": dtype}, lora=VARIANTS[init]), work_dir=work_dir)
        assert losses(work_dir)[-1] < losses(work_dir)[0]
        assert json.loads((adapter / "course.json").read_text())["dtype"] == dtype
        started = read_metrics(work_dir)[0]
        assert ("DoRA" if init == "dora" else {"nf4": "4096 weights", "int8": "int8"}[dtype]) in started["engine"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_ends_bit_identical(
    make: Any, tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the start is not drawn anew: another machine would draw another."""
    recipe = make(
        lora={**VARIANTS[variant], "dropout": 0.2},
        data={"held_out": 2},
        training={"max_steps": 4, "checkpoint_every": 2, "keep_checkpoints": 9},
    )
    events: list = []
    straight = train(recipe, work_dir=tmp_path / "run", listeners=[events.append])
    whole, held_out = (straight / "adapter_model.safetensors").read_bytes(), read_metrics(tmp_path / "run")[-3]
    shutil.rmtree(tmp_path / "run" / "checkpoint-000004")

    def anew(*_: object, **__: object) -> None:
        raise AssertionError("the start was drawn anew")

    monkeypatch.setattr("course_lib.training.adapters.start_from_weights", anew)
    monkeypatch.setattr("course_lib.training.adapters.start_from_activations", anew)
    torch.manual_seed(99)
    resumed = train(recipe, work_dir=tmp_path / "run", resume=True)
    assert (resumed / "adapter_model.safetensors").read_bytes() == whole
    assert read_metrics(tmp_path / "run")[-3] == held_out


@pytest.mark.parametrize("variant", ["pissa", "dora", "all at once"])
def test_what_a_run_saves_has_the_loss_it_told(make: Any, tiny: Path, tmp_path: Path, variant: str) -> None:
    from course_lib.evaluation import held_out_loss

    events: list = []
    recipe = make(lora=VARIANTS[variant], data={"held_out": 2})
    adapter = train(recipe, work_dir=tmp_path / "run", listeners=[events.append])
    first, last = (event.loss for event in events if isinstance(event, HeldOutLoss))
    run = prepare_run(make(data={"held_out": 2}), tmp_path)
    base, _ = load_model(tiny, dtype="float32")
    assert held_out_loss(base, run.dataset.held_out) == pytest.approx(first, rel=1e-4)
    loaded, _ = load_model(tiny, dtype="float32", adapter=adapter)
    assert held_out_loss(loaded, run.dataset.held_out) == pytest.approx(last, rel=1e-4)
    assert last < first
    checkpoint, _ = load_model(tiny, dtype="float32", adapter=tmp_path / "run" / "checkpoint-000006")
    assert torch.equal(logits(checkpoint), logits(loaded))


def test_a_checkpoint_of_another_start_is_not_mixed_in(tiny: Path, tmp_path: Path) -> None:
    folder = saved(adapted(tiny, "pissa", seed=0), tmp_path / "one", tiny)
    other = moved(adapted(tiny, "olora", rslora=False))
    with pytest.raises(CourseError, match="began from another start"):
        load_weights(other, folder)


def test_another_recipe_is_told_before_the_model_is_loaded(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make(training={"max_steps": 1}), work_dir=tmp_path / "run")
    monkeypatch.setattr("course_lib.training.run.load_model", None)
    with pytest.raises(InputError, match=r"lora\.init was 'default' and is 'pissa'"):
        train(make(training={"max_steps": 1}, lora={"init": "pissa"}), work_dir=tmp_path / "run", resume=True)


@pytest.mark.parametrize("dora", [False, True])
def test_lora_plus_makes_b_learn_faster_and_the_log_tells_the_rate_of_a(make: Any, tmp_path: Path, dora: bool) -> None:
    events: list = []
    settings = {"lr": 1e-3, "schedule": "linear", "warmup_ratio": 0.0, "max_steps": 4}
    recipe = make(lora={"lr_ratio": 16, "dora": dora}, training=settings)
    train(recipe, work_dir=tmp_path / "run", listeners=[events.append])
    rates = [event.lr for event in events if isinstance(event, StepDone)]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    run = prepare_run(recipe, tmp_path)
    assert ("DoRA" in run.engine.description) == dora
    slow, fast = run.update.optimizer.param_groups
    assert (slow["lr"], fast["lr"]) == (1e-3, 16e-3)
    run.schedule.step()
    assert (slow["lr"], fast["lr"]) == pytest.approx((0.75e-3, 12e-3))
    names = {id(parameter): name for name, parameter in run.engine.named_trainable.items()}
    assert all("lora_A" in names[id(parameter)] for parameter in slow["params"])
    assert not any("lora_A" in names[id(parameter)] for parameter in fast["params"])
    assert sum(parameter.numel() for group in (slow, fast) for parameter in group["params"]) == sum(
        parameter.numel() for parameter in run.bare_model.parameters() if parameter.requires_grad
    )


@pytest.mark.parametrize("lora", [{"lr_ratio": 8, "rslora": True}, {"init": "pissa"}, {"init": "eva"}])
def test_both_engines_learn_alike(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any]
) -> None:
    results = []
    for engine in ("fused", "plain"):
        if engine == "plain":
            monkeypatch.setattr("course_lib.training.run.why_not_fused", lambda _: "asked for by the test")
        train(make(lora=lora, training={"lr": 5e-4}), work_dir=tmp_path / engine)
        results.append(losses(tmp_path / engine))
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_changed_weights_may_lie_in_host_memory(make: Any, tmp_path: Path) -> None:
    for name, offload in {"resident": [], "offloaded": ["layers", "embedding", "head"]}.items():
        train(make(lora={"init": "pissa"}, training={"offload": offload}), work_dir=tmp_path / name)
    assert losses(tmp_path / "offloaded") == pytest.approx(losses(tmp_path / "resident"), rel=1e-5)


def test_without_a_ratio_or_decay_there_is_one_group(make: Any, tmp_path: Path) -> None:
    assert len(prepare_run(make(), tmp_path).update.optimizer.param_groups) == 1
    assert len(prepare_run(make(lora=None), tmp_path).update.optimizer.param_groups) == 1


def test_norms_and_biases_are_not_decayed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    settings = TrainingSettings(lr=1e-3, weight_decay=0.1)
    optimizer = make_optimizer(parameter_groups(dict(model.named_parameters()), settings), settings)
    decayed, others = optimizer.param_groups
    assert [parameter.ndim for parameter in decayed["params"]] == [2]
    assert (decayed["weight_decay"], others["weight_decay"], len(others["params"])) == (0.1, 0.0, 3)
    make_schedule(optimizer, settings, total_steps=10)
    assert decayed["lr"] == others["lr"]


def test_the_log_tells_why_the_models_own_layers_run(make: Any, tmp_path: Path) -> None:
    events: list = []
    train(make(lora={"dora": True}, training={"max_steps": 1}), work_dir=tmp_path / "run", listeners=[events.append])
    started = next(event for event in events if isinstance(event, RunStarted))
    assert started.engine == "the model's own layers (DoRA scales the rows of frozen weights)"
