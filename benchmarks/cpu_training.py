"""Training speed on this machine's CPU: this library beside transformers' Trainer with peft, on the same rows.

    python benchmarks/cpu_training.py [--rows 48] [--pairs 5] [--out benchmarks/results/cpu_training.json]

Both train the embedded model with the same LoRA, optimizer, schedule, rows, order and labels; the losses must agree.
Each pair runs one after the other, and every second pair in reverse order, after one warm-up of each. Ratios are
Trainer's seconds over ours within a pair. What is timed is the steps alone, not loading.

| setting | ours | Trainer |
|---|---|---|
| no packing | 8 rows a step, laid end to end without padding | 8 rows a step, padded to the longest |
| packing | best-fit packs of 1,024 tokens | 8 rows a step, padded to the longest |
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning OpenMP threads are many times slower on shared cores

import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from course_lib.data.collate import pad
from course_lib.data.dataset import load_dataset
from course_lib.data.templates import choose_template
from course_lib.models import load_model
from course_lib.recipe import Recipe, make_recipe
from course_lib.training.adapters import add_lora
from course_lib.training.batches import plan_steps
from course_lib.training.events import Event, RunStarted, StepDone
from course_lib.training.loop import train

BATCH_SIZE, LEARNING_RATE = 8, 3e-4


def recipe(data_path: str, rows: int, *, packing: str) -> Recipe:
    """The run that is timed."""
    return make_recipe(
        {
            "model": {"name": "smollm2-135m-instruct", "dtype": "float32"},
            "lora": {"r": 16, "alpha": 32},
            "data": {
                "path": data_path,
                "max_rows": rows,
                "max_length": 1024 if packing == "best-fit" else 512,
                "packing": packing,
            },
            "training": {
                "batch_size": 1 if packing == "best-fit" else BATCH_SIZE,
                "lr": LEARNING_RATE,
                "schedule": "constant",
                "warmup_ratio": 0,
            },
        }
    )


def time_ours(settings: Recipe) -> dict[str, Any]:
    """Seconds from the first step to the last, and the losses."""
    clock = {"start": 0.0, "end": 0.0}
    losses: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, RunStarted):
            clock["start"] = time.perf_counter()
        elif isinstance(event, StepDone):
            clock["end"] = time.perf_counter()
            losses.append(event.loss)

    with tempfile.TemporaryDirectory() as folder:
        train(settings, work_dir=folder, listeners=[listen])
    return {"seconds": clock["end"] - clock["start"], "losses": losses}


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.start = self.end = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.end = time.perf_counter()


class _InOrder(Trainer):
    """The order is made outside, so that both sides see the same rows at the same step."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def time_trainer(settings: Recipe) -> dict[str, Any]:
    """The same run through transformers' Trainer and peft."""
    torch.manual_seed(settings.training.seed)
    model, tokenizer = load_model(settings.model.name, dtype="float32")
    dataset = load_dataset(settings.data, template=choose_template(tokenizer), tokenizer=tokenizer)
    plan = plan_steps(dataset.train, settings.data, settings.training)
    rows = [example for step in range(plan.total_steps) for batch in plan.micro_batches(step) for example in batch]
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _InOrder(
            model=add_lora(model, settings.lora),
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=BATCH_SIZE,
                num_train_epochs=1,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=rows,
            data_collator=lambda batch: pad(batch, pad_token_id=tokenizer.pad_token_id),
            callbacks=[clock],
        )
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        trainer.train()
    return {
        "seconds": clock.end - clock.start,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def compare(ours: Recipe, theirs: Recipe, pairs: int) -> dict[str, Any]:
    """Run the pairs and return every figure."""
    sides = {"ours": lambda: time_ours(ours), "trainer": lambda: time_trainer(theirs)}
    for run in sides.values():
        run()
    measured = []
    for number in range(pairs):
        order = list(sides) if number % 2 == 0 else list(sides)[::-1]
        pair = {side: sides[side]() for side in order}
        measured.append({"order": order, **pair})
        print(f"pair {number + 1}: ours {pair['ours']['seconds']:.1f} s, Trainer {pair['trainer']['seconds']:.1f} s")
    ratios = [pair["trainer"]["seconds"] / pair["ours"]["seconds"] for pair in measured]
    return {
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "pairs": measured,
    }


def main() -> None:
    """Measure both settings, print the ratios, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="sample:general_chat.json")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_training.json"))
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    plain = recipe(arguments.data, arguments.rows, packing="none")
    packed = recipe(arguments.data, arguments.rows, packing="best-fit")
    result = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "OMP_WAIT_POLICY": os.environ["OMP_WAIT_POLICY"],
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": arguments.rows,
        "no packing": compare(plain, plain, arguments.pairs),
        "packing": compare(packed, plain, arguments.pairs),
    }
    for setting in ("no packing", "packing"):
        part = result[setting]
        print(
            f"{setting}: {part['ratio_median']:.2f} times Trainer's speed (from {part['ratio_min']:.2f} to {part['ratio_max']:.2f} in {arguments.pairs} pairs)"
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
