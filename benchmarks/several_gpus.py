"""`course train` on one GPU and on several: tokens a second and losses of the same recipe.

    python benchmarks/several_gpus.py [--gpus 2] [--runs nf4 …] [--out benchmarks/results/several_gpus.json]

The models have InternLM-7B's shape and random weights: all 32 layers for NF4, and 8 for DeepSpeed, whose stages hold the weights in
bfloat16. A step is 8 packs of 2,048 tokens in micro-batches of 4 or 2, whatever the number of GPUs; LoRA of rank 64 on all
linear layers. Speed is the median of the steps after the third; losses are compared with those of one GPU and the same layers: the model's
own, which DeepSpeed runs, round W x to bfloat16 before an adapter's part is added, and lose much of what the first steps change.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu_training import SHAPE

from course_lib.models import model_folder
from course_lib.recipe import Recipe, make_recipe
from course_lib.training.listeners import read_metrics

STEPS, LENGTH, PACKS = 10, 2048, 8
OWN = "8 layers, one GPU, --deepspeed zero1"  # the model's own layers, as DeepSpeed runs them
RUNS: dict[str, dict[str, Any]] = {  # model, what it is compared with, and options of course train
    "nf4": {"layers": 32, "dtype": "nf4"},
    "nf4, data parallel": {"layers": 32, "dtype": "nf4", "beside": "nf4", "options": []},
    "nf4, --fsdp": {"layers": 32, "dtype": "nf4", "beside": "nf4", "options": ["--fsdp"]},
    "8 layers": {"layers": 8, "dtype": "bfloat16"},
    OWN: {"layers": 8, "gpus": 1, "options": ["--deepspeed", "zero1"]},
    "8 layers, --deepspeed zero2": {"layers": 8, "beside": OWN, "options": ["--deepspeed", "zero2"]},
    "8 layers, --deepspeed zero3": {"layers": 8, "beside": OWN, "options": ["--deepspeed", "zero3"]},
}


def random_model(folder: Path, layers: int) -> Path:
    """A folder with random weights of InternLM-7B's shape and the tiny model's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"), no_init_weights():
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": layers}))
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1) if "norm" in name else parameter.normal_(0, 0.02)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    for file in model_folder("tiny").iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, folder)
    return folder


def recipe(model: Path, rows: Path, dtype: str) -> Recipe:
    """The run that is timed."""
    micro = 4 if dtype == "nf4" else 2
    return make_recipe(
        {
            "model": {"name": str(model), "dtype": dtype},
            "lora": {"r": 64, "alpha": 16},
            "data": {"path": str(rows), "max_length": LENGTH, "over_long": "truncate"},
            "training": {
                "batch_size": micro,
                "accumulation": PACKS // micro,
                "max_steps": STEPS,
                "epochs": STEPS,
                "lr": 1e-4,
                "schedule": "constant",
                "optimizer": "adamw_8bit" if dtype == "nf4" else "adamw",
                "gradient_checkpointing": True,
            },
        }
    )


def write_rows(path: Path) -> Path:
    """Rows longer than a pack, each another."""
    rows = [{"instruction": "count", "output": f"{first} two three four " * LENGTH} for first in range(4 * PACKS)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def measure(settings: Recipe, folder: Path, options: list[str]) -> dict[str, Any]:
    """Run `course train` and read what it wrote."""
    settings.save(folder.with_suffix(".yaml"))
    command = ["-m", "course_lib.cli", "train", str(folder.with_suffix(".yaml")), "--work-dir", str(folder), *options]
    ended = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if ended.returncode:
        return {"error": ended.stderr[-2000:]}
    steps = [event for event in read_metrics(folder) if event["event"] == "StepDone"]
    return {
        "tokens_per_second": statistics.median(step["tokens_per_second"] for step in steps[3:]),
        "tokens_a_step": steps[0]["tokens"],
        "losses": [step["loss"] for step in steps],
        "grad_norms": [step["grad_norm"] for step in steps],
        "peak_gb_of_the_first_gpu": steps[-1]["memory_bytes"] / 1e9,
    }


def main() -> None:
    """Measure every run, print the table, write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/several_gpus.json"))
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "gpus": arguments.gpus,
        "torch": torch.__version__,
        "runs": {},
    }
    runs = result["runs"]
    with tempfile.TemporaryDirectory() as scratch:
        rows = write_rows(Path(scratch) / "rows.jsonl")
        for number, name in enumerate(arguments.runs):
            run = RUNS[name]
            model = Path(scratch) / f"model-{run['layers']}"
            if not model.exists():
                random_model(model, run["layers"])
            beside = run.get("beside")
            gpus = run.get("gpus", 1 if beside is None else arguments.gpus)
            options = [*(["--gpus", str(gpus)] if gpus > 1 else []), *run.get("options", [])]
            settings = recipe(model, rows, run.get("dtype", "bfloat16"))
            found = runs[name] = measure(settings, Path(scratch) / f"run-{number}", options)
            if "error" in found:
                print(f"{name:30} {found['error'][-300:]}", flush=True)
            else:
                line = f"{name:30} {found['tokens_per_second']:9,.0f} tokens/s  {found['peak_gb_of_the_first_gpu']:6.2f} GB"
                if beside and "losses" in runs.get(beside, {}):
                    one = runs[beside]
                    found["times_one_gpu"] = found["tokens_per_second"] / one["tokens_per_second"]
                    pairs = zip(found["losses"], one["losses"], strict=True)
                    found["largest_loss_difference"] = max(abs(mine - other) for mine, other in pairs)
                    line += f"  {found['times_one_gpu']:.2f} times one GPU, losses within {found['largest_loss_difference']:.1e}"
                print(line, flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
