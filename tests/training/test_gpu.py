"""The same loop on a GPU. Run on a machine that has one: pytest -m gpu."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from course_lib.export.merge import merge
from course_lib.model_shape import ModelShape
from course_lib.models import load_model
from course_lib.recipe import load_recipe, make_recipe, with_overrides
from course_lib.training.listeners import read_metrics
from course_lib.training.loop import train
from course_lib.training.memory_prediction import predict_memory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


def losses(work_dir: Path, event: str = "StepDone") -> list[float]:
    return [found["loss"] for found in read_metrics(work_dir) if found["event"] == event]


def test_float32_follows_the_cpu(make: Any, tmp_path: Path) -> None:
    on_gpu = train(make(), work_dir=tmp_path / "gpu")
    code = f"from course_lib import load_recipe, train; train(load_recipe({str(tmp_path / 'gpu/recipe.yaml')!r}), work_dir={str(tmp_path / 'cpu')!r})"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=True)
    assert on_gpu.is_dir()
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)


@pytest.mark.parametrize("dtype", ["nf4", "int8", "bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_8bit"])
def test_every_number_format_trains_and_resumes(make: Any, tmp_path: Path, dtype: str, optimizer: str) -> None:
    recipe = make(
        model={"dtype": dtype},
        training={"optimizer": optimizer, "gradient_checkpointing": dtype == "nf4", "checkpoint_every": 3},
        data={"held_out": 2},
        evaluation={"questions": ["hi"], "max_new_tokens": 4},
    )
    train(recipe, work_dir=tmp_path / "run")
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    shutil.rmtree(tmp_path / "run" / "checkpoint-000006")
    train(recipe, work_dir=tmp_path / "run", resume=True)
    assert len(losses(tmp_path / "run")) == 6


def test_packing_changes_no_loss_in_bfloat16(make: Any, tmp_path: Path) -> None:
    for packing in ("none", "best-fit"):
        train(
            make(model={"dtype": "bfloat16"}, data={"packing": packing}, training={"batch_size": 12, "max_steps": 3}),
            work_dir=tmp_path / packing,
        )
    assert losses(tmp_path / "best-fit") == pytest.approx(losses(tmp_path / "none"), rel=2e-3)


def test_an_adapter_trained_in_nf4_merges_into_what_it_was_trained_on(make: Any, tmp_path: Path) -> None:
    adapter = train(make(model={"dtype": "nf4"}, training={"lr": 5e-2}), work_dir=tmp_path / "run")
    merged = merge("tiny", adapter, tmp_path / "merged", dtype="float32")
    ids = torch.arange(3, 60, device="cuda")[None]
    with torch.inference_mode():
        expected = load_model("tiny", dtype="nf4", adapter=adapter)[0](ids).logits.float()
        bare = load_model("tiny", dtype="nf4")[0](ids).logits.float()
        got = load_model(merged, dtype="float32")[0](ids).logits
    assert (got - expected).norm() < 0.05 * (bare - expected).norm()


@pytest.mark.slow
def test_the_7b_recipe_trains(tiny: Path, tmp_path: Path) -> None:
    """The shipped 7B QLoRA recipe on random weights of Qwen2.5-7B's shape; prints its speed and peak memory."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path / "random-7b"
    config = Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen2ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny / name, folder)
    recipe = load_recipe(
        "qwen2_5_7b_instruct_qlora_personal_assistant_512_e3",
        [
            f"model.name={folder}",
            "training.max_steps=6",
            "training.log_every=1",
            "evaluation.max_new_tokens=5",
            "training.lr=1e-3",
        ],
    )
    recipe = make_recipe(recipe.model_dump())
    train(recipe, work_dir=tmp_path / "run")
    steps = [event for event in read_metrics(tmp_path / "run") if event["event"] == "StepDone"]
    print(
        "7B:",
        json.dumps(
            [
                {key: step[key] for key in ("loss", "grad_norm", "tokens", "tokens_per_second", "memory_bytes")}
                for step in steps
            ]
        ),
    )
    assert min(step["grad_norm"] for step in steps) > 0
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_variable_length_attention_isolates_samples_in_loss_and_gradients(tiny: Path) -> None:
    """Invariant 3 on a GPU: a flat row in bfloat16 against single rows in float32, by relative error of every gradient."""
    from course_lib.data.collate import flatten, pad
    from course_lib.data.tokenize import IGNORE_INDEX, Example
    from course_lib.training import attention as attention_module
    from course_lib.training.loss import supervised_loss

    assert attention_module.varlen_attn is not None
    generator = torch.Generator().manual_seed(3)
    examples = []
    for length, prompt in ((300, 40), (17, 5), (129, 100), (64, 2)):
        ids = torch.randint(3, 250, (length,), generator=generator).tolist()
        examples.append(Example(ids, [IGNORE_INDEX] * prompt + ids[prompt:]))

    def on_gpu(batch: dict) -> dict:
        return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}

    def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return {name: parameter.grad.float().clone() for name, parameter in model.named_parameters()}

    exact, _ = load_model("tiny", dtype="float32")
    expected_loss = sum(supervised_loss(exact, on_gpu(pad([example], pad_token_id=0))) for example in examples)
    expected = gradients(exact, expected_loss)
    model, _ = load_model("tiny", dtype="bfloat16")
    errors = {}
    for layout in ("single rows", "flat"):
        if layout == "flat":
            with attention_module.attention(model, attention_module.SEGMENTS):
                loss = supervised_loss(model, on_gpu(flatten(examples)))
                got = gradients(model, loss)
        else:
            loss = sum(supervised_loss(model, on_gpu(pad([example], pad_token_id=0))) for example in examples)
            got = gradients(model, loss)
        assert loss.item() == pytest.approx(expected_loss.item(), rel=5e-3)
        errors[layout] = max(((got[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected)
    print("largest relative gradient error in bfloat16:", errors)
    assert errors["flat"] < 2 * errors["single rows"]  # no worse than bfloat16 itself


def test_a_run_in_nf4_killed_while_saving_resumes_to_the_same_adapter(make: Any, tmp_path: Path) -> None:
    """SIGKILL at step 10 of 20 during a checkpoint. Sums on a GPU may come in another order, so: the same to rounding."""
    from safetensors.torch import load_file

    recipe = make(
        model={"dtype": "nf4", "double_quant": False},
        training={"max_steps": 20, "epochs": 10, "checkpoint_every": 5, "optimizer": "adamw_8bit"},
    )
    straight = load_file(train(recipe, work_dir=tmp_path / "straight") / "adapter_model.safetensors")
    recipe.save(tmp_path / "recipe.yaml")
    script = (
        "import os, signal, torch\n"
        "save = torch.save\n"
        "def kill(value, path):\n"
        "    save(value, path)\n"
        "    if value['step'] == 10: os.kill(os.getpid(), signal.SIGKILL)\n"
        "torch.save = kill\n"
        "from course_lib import load_recipe, train\n"
        f"train(load_recipe({str(tmp_path / 'recipe.yaml')!r}), work_dir={str(tmp_path / 'killed')!r})\n"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=300).returncode == -9
    resumed = load_file(train(recipe, work_dir=tmp_path / "killed", resume=True) / "adapter_model.safetensors")
    assert losses(tmp_path / "killed") == pytest.approx(losses(tmp_path / "straight"), rel=1e-3)
    for name, tensor in straight.items():
        assert (resumed[name] - tensor).norm() < 0.02 * tensor.norm() + 1e-6, name


@pytest.mark.slow
def test_a_7b_trains_under_caps(tmp_path: Path) -> None:
    """InternLM-7B's shape in NF4, rank 64, at 512 and 2048 tokens, in processes that may allocate no more than 8, 6, 5 and 2.5 GiB."""
    script = Path(__file__).parents[2] / "benchmarks" / "memory_caps.py"
    command = [sys.executable, str(script), "--together", "--out", str(tmp_path / "caps.json")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for run in json.loads((tmp_path / "caps.json").read_text())["runs"]:
        assert run["peak_gib"] < run["cap_gib"]
        assert run["predicted_gib"] == pytest.approx(run["peak_gib"], rel=0.05)
        assert run["tokens_a_step"] == run["length"]
        assert run["losses"][-1] < run["losses"][0]
        assert run["smallest_grad_norm"] > 0


@pytest.mark.parametrize(
    ("dtype", "lora"),
    [
        ("nf4", {"rslora": True, "lr_ratio": 4}),
        ("nf4", {"dora": True}),
        ("int8", {"dora": True}),
        ("nf4", {"init": "eva"}),
        ("int8", {"init": "eva"}),
        ("bfloat16", {"init": "pissa"}),
        ("bfloat16", {"init": "pissa", "dora": True, "dtype": "bfloat16"}),
        ("float32", {"init": "olora"}),
    ],
)
def test_variants_of_adapters_train_and_resume(make: Any, tmp_path: Path, dtype: str, lora: dict[str, Any]) -> None:
    """What is saved has, on the unchanged base, the loss that was told; a resumed run ends with the same one."""
    from course_lib.evaluation import held_out_loss
    from course_lib.training.run import prepare_run

    recipe = make(model={"dtype": dtype}, lora=lora, data={"held_out": 2}, training={"checkpoint_every": 4})
    adapter = train(recipe, work_dir=tmp_path / "run")
    told = losses(tmp_path / "run", "HeldOutLoss")
    assert told[-1] < told[0]
    held_out = prepare_run(recipe, tmp_path / "run").dataset.held_out
    loaded, _ = load_model("tiny", dtype=dtype, adapter=adapter)
    assert held_out_loss(loaded, held_out) == pytest.approx(told[-1], rel=0.01)
    shutil.rmtree(tmp_path / "run" / "checkpoint-000006")
    train(recipe, work_dir=tmp_path / "run", resume=True)
    assert losses(tmp_path / "run", "HeldOutLoss")[-1] == pytest.approx(told[-1], rel=0.01)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one NVIDIA GPU")
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("nf4", []),
        ("bfloat16", ["--fsdp"]),
        ("bfloat16", ["--deepspeed", "zero1"]),
        ("nf4", ["--deepspeed", "zero2"]),
        ("bfloat16", ["--deepspeed", "zero3"]),
    ],
)
def test_two_gpus_take_the_steps_of_one(make: Any, tmp_path: Path, dtype: str, options: list[str]) -> None:
    if "--deepspeed" in options:
        pytest.importorskip("deepspeed")
    recipe = make(model={"dtype": dtype}, training={"accumulation": 2})
    recipe.save(tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "course_lib.cli", "train", str(tmp_path / "recipe.yaml"), "--work-dir"]
    for name, more in {"one": [], "two": ["--gpus", "2", *options]}.items():
        subprocess.run([*command, str(tmp_path / name), *more], check=True, timeout=300)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-3)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A folder with random weights of a Llama of 160 million parameters and the tiny model's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("small")
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in tiny.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        (["model.dtype=bfloat16"], 0.05),
        (["model.dtype=bfloat16", "training.gradient_checkpointing=4", "training.optimizer=adamw_8bit"], 0.05),
        (["model.dtype=nf4", "lora.dtype=bfloat16"], 0.05),
        (["model.dtype=nf4", "lora.dropout=0.1", "training.gradient_checkpointing=true"], 0.05),
        (["training.gradient_checkpointing=true", "training.offload=[embedding,head,checkpoints,layers]"], 0.05),
        (["model.dtype=int8"], 0.15),
        (["model.dtype=float16", "training.gradient_checkpointing=true"], 0.15),
        (["lora=null", "model.dtype=bfloat16"], 0.15),
        (["lora=null", "model.dtype=bfloat16", "training.optimizer=paged_adamw_8bit"], 0.15),
    ],
)
def test_memory_is_foretold(small: Path, tmp_path: Path, overrides: list[str], tolerance: float) -> None:
    """Predicted and measured peak of three steps of 4 x 1,024 tokens, in a process of its own."""
    row = {"instruction": "count", "output": "one two three four five six " * 200}
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for _ in range(16)))
    content = {
        "model": {"name": str(small)},
        "lora": {"r": 32},
        "data": {"path": str(tmp_path / "rows.jsonl"), "max_length": 1024, "over_long": "truncate"},
        "training": {"batch_size": 4, "max_steps": 3},
    }
    recipe = with_overrides(make_recipe(content), overrides)
    recipe.save(tmp_path / "recipe.yaml")
    script = (
        "from course_lib import load_recipe, train\n"
        f"train(load_recipe({str(tmp_path / 'recipe.yaml')!r}), work_dir={str(tmp_path / 'run')!r})\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    step = [event for event in read_metrics(tmp_path / "run") if event["event"] == "StepDone"][-1]
    assert step["tokens"] == 4096
    predicted = predict_memory(recipe, ModelShape.of(small))
    measured = step["memory_bytes"]
    print("memory:", json.dumps({"overrides": overrides, "predicted": predicted.peak, "measured": measured}))
    assert predicted.peak == pytest.approx(measured, rel=tolerance)


def test_running_out_of_memory_ends_with_what_to_set(small: Path, tmp_path: Path) -> None:
    row = {"instruction": "count", "output": "one two three four five six " * 200}
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for _ in range(16)))
    content = {
        "model": {"name": str(small)},
        "data": {"path": str(tmp_path / "rows.jsonl"), "max_length": 1024, "over_long": "truncate"},
        "training": {"batch_size": 8, "max_steps": 2},
    }
    make_recipe(content).save(tmp_path / "recipe.yaml")
    script = (
        "import torch\n"
        "torch.cuda.set_per_process_memory_fraction(2**30 / torch.cuda.get_device_properties(0).total_memory)\n"
        "import sys; sys.argv = ['course', 'train', 'recipe.yaml', '--work-dir', 'run']\n"
        "from course_lib.cli import main; main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert ended.returncode == 1
    assert "memory ran out" in ended.stderr.splitlines()[-1]
    assert "--set" in ended.stderr.splitlines()[-1]
