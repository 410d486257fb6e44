"""InternLM-7B's shape trained in NF4 by processes that may allocate no more than a cap: 8, 6, 5 GiB, and 2.5 with the layers streamed.

    python benchmarks/memory_caps.py [--together] [--out benchmarks/results/memory_caps.json]

Random weights, LoRA of rank 64 on all linear layers in bfloat16, 8-bit AdamW, gradient checkpointing, one pack of 512 or 2,048 tokens a
step. The cap is `torch.cuda.set_per_process_memory_fraction`: what would go over it is an out-of-memory error. With `--together` all runs
share the card at the same time, which is quicker and makes their speeds worthless.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from several_gpus import random_model

from course_lib.model_shape import ModelShape
from course_lib.recipe import load_recipe, make_recipe
from course_lib.training.listeners import read_metrics
from course_lib.training.memory_prediction import predict_memory

GIB = 2**30
CAPS: dict[float, list[str]] = {  # GiB: what stays in host memory
    8: [],
    6: ["embedding", "head"],
    5: ["embedding", "head", "checkpoints"],
    2.5: ["embedding", "head", "checkpoints", "layers"],
}
LENGTHS = (512, 2048)


def start(model: Path, folder: Path, cap: float, length: int) -> subprocess.Popen[str]:
    """Train under the cap, in a process of its own."""
    rows = folder.with_suffix(".jsonl")
    long = {"instruction": "count", "output": "one two three four five six " * 400}
    rows.write_text("\n".join(json.dumps(long) for _ in range(8)))
    recipe = make_recipe(
        {
            "model": {"name": str(model), "dtype": "nf4"},
            "lora": {"r": 64, "alpha": 16, "dtype": "bfloat16"},
            "data": {"path": str(rows), "max_length": length, "over_long": "truncate"},
            "training": {
                "max_steps": 6,
                "lr": 1e-3,
                "optimizer": "adamw_8bit",
                "gradient_checkpointing": True,
                "offload": CAPS[cap],
            },
        }
    )
    recipe.save(folder.with_suffix(".yaml"))
    script = (
        "from course_lib import load_recipe, train\n"  # before the first word to the GPU: it says how memory is reserved
        "import torch\n"
        f"torch.cuda.set_per_process_memory_fraction({cap * GIB} / torch.cuda.get_device_properties(0).total_memory)\n"
        f"train(load_recipe({str(folder.with_suffix('.yaml'))!r}), work_dir={str(folder)!r})\n"
    )
    return subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)


def outcome(running: subprocess.Popen[str], folder: Path) -> dict[str, Any]:
    """What a run did, once it has ended."""
    _, said = running.communicate()
    if running.returncode:
        return {"error": said[-1000:]}
    steps = [event for event in read_metrics(folder) if event["event"] == "StepDone"]
    return {
        "peak_gib": steps[-1]["memory_bytes"] / GIB,
        "tokens_a_step": steps[-1]["tokens"],
        "tokens_per_second": steps[-1]["tokens_per_second"],
        "losses": [step["loss"] for step in steps],
        "smallest_grad_norm": min(step["grad_norm"] for step in steps),
    }


def main() -> None:
    """Run every cap at both lengths, print a line each, write the JSON; exit 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory_caps.json"))
    arguments = parser.parse_args()
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "runs": []}
    with tempfile.TemporaryDirectory() as scratch:
        model = random_model(Path(scratch) / "model", 32)
        waiting = [(cap, length, Path(scratch) / f"{cap}-{length}") for cap in CAPS for length in LENGTHS]
        if arguments.together:
            started = [start(model, folder, cap, length) for cap, length, folder in waiting]
            ended = [outcome(run, folder) for run, (_, _, folder) in zip(started, waiting, strict=True)]
        else:
            ended = [outcome(start(model, folder, cap, length), folder) for cap, length, folder in waiting]
        shape = ModelShape.of(model)
        predicted = [predict_memory(load_recipe(folder.with_suffix(".yaml")), shape).peak for _, _, folder in waiting]
    for (cap, length, _), found, foretold in zip(waiting, ended, predicted, strict=True):
        found["predicted_gib"] = foretold / GIB
        result["runs"].append({"cap_gib": cap, "length": length, "offload": CAPS[cap], **found})
        shown = found.get("error") or (
            f"peak {found['peak_gib']:.2f} GiB, predicted {found['predicted_gib']:.2f}, {found['tokens_per_second']:,.0f} tokens/s, loss "
            f"{found['losses'][0]:.2f} to {found['losses'][-1]:.2f}"
        )
        print(f"{cap:4} GiB, {length:4} tokens: {shown}", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(any("error" in found for found in ended))


if __name__ == "__main__":
    main()
