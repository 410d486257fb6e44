"""Checkpoints that DeepSpeed itself writes, on CPU ranks: what comes out of them is what its own zero_to_fp32 finds there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from course_lib.export.checkpoint_reader import read_checkpoint
from course_lib.export.convert import convert

pytest.importorskip("deepspeed", reason="deepspeed is not installed")

TRAINING = """
import sys
import deepspeed, torch
from pathlib import Path
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

deepspeed.init_distributed(dist_backend="gloo")
shape = dict(vocab_size=259, hidden_size=56, intermediate_size=127, num_hidden_layers=2, num_attention_heads=4)
for stage in (1, 2, 3):
    for kind in ("lora", "full"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2))
        if kind == "lora":
            model = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj"]))
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "bf16": {"enabled": stage == 2},
        }
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
        ids = torch.arange(3, 23)[None]
        for _ in range(2):
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        engine.save_checkpoint(f"{sys.argv[1]}/{kind}-{stage}", exclude_frozen_parameters=kind == "lora")
"""


@pytest.mark.slow
def test_every_stage(tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    (tmp_path / "train.py").write_text(TRAINING)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", str(tmp_path)]
    ended = subprocess.run([sys.executable, *launch], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for folder in sorted(path for path in tmp_path.iterdir() if path.is_dir()):
        expected = get_fp32_state_dict_from_zero_checkpoint(str(folder), exclude_frozen_parameters=True)
        found = read_checkpoint(folder).tensors
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name].read(), expected[name]) for name in expected), folder.name
        assert len(found) == (12 if "lora" in folder.name else 21)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_run_here(stage: str, tiny: Path, tmp_path: Path) -> None:
    """The shares in its checkpoint are the adapter that it writes at the end."""
    rows = [{"instruction": f"q{number}", "output": "yes"} for number in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    recipe = {"model": {"name": "tiny", "dtype": "float32"}, "lora": {"r": 3}, "data": {"path": "rows.json"}}
    recipe["training"] = {"max_steps": 2, "epochs": 2, "lr": 1e-2}
    (tmp_path / "my.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "course_lib.cli", "train", "my.yaml", "--work-dir", "run", "--deepspeed", stage]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    checkpoint = tmp_path / "run" / "checkpoint-000002"
    (checkpoint / "adapter_model.safetensors").unlink()
    convert(checkpoint, tmp_path / "out")
    found, expected = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", tmp_path / "run/adapter")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
