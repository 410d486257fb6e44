"""A million short rows from a file to packs: rows a second, and the memory it takes.

    python benchmarks/million_rows.py [--rows 1000000] [--out benchmarks/results/million_rows.json]

Rows are one question and one answer of ChatML, made up by a seed, 40 tokens on average, in one JSON Lines file. Each part
is timed by itself, in a fresh cache: reading, tokenising (on all processors), planning packs, going once through all packs
as training does, and loading again from the cache. Memory is the peak resident set of this process and of its largest
child, as the kernel counts it; tables are memory-mapped, so the kernel may count file pages it could drop at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
WORDS = [
    "river",
    "stone",
    "light",
    "garden",
    "window",
    "small",
    "green",
    "morning",
    "paper",
    "music",
    "answer",
    "question",
    "number",
    "city",
    "road",
    "water",
]


def write_rows(path: Path, count: int) -> None:
    """Write `count` rows of one turn."""
    chosen = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            question, answer = (" ".join(chosen.choices(WORDS, k=chosen.randint(2, 24))) for _ in range(2))
            row = [{"role": "user", "content": f"{number}: {question}?"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": row}) + "\n")


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/million_rows.json"))
    arguments = parser.parse_args()
    from course_lib.models import load_tokenizer, model_folder

    folder = model_folder("smollm2-135m-instruct").resolve()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["COURSE_HOME"] = scratch
        write_rows(Path(scratch) / "rows.jsonl", arguments.rows)
        result = measure(Path(scratch) / "rows.jsonl", load_tokenizer(folder), arguments.rows)
    print(f"{result['rows']:,} rows, {result['tokens']:,} tokens, {result['packs']:,} packs, {result['cores']} cores")
    for part, seconds in result["seconds"].items():
        print(f"{part:28} {seconds:8.2f} s {result['rows'] / seconds:12,.0f} rows/s")
    print(f"peak memory: {result['peak_mb']:,.0f} MB, largest child {result['peak_child_mb']:,.0f} MB")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(path: Path, tokenizer: Any, rows: int) -> dict[str, Any]:
    """Take the rows of a file through every part."""
    from course_lib.data.dataset import load_conversations, load_dataset
    from course_lib.data.report import DataReport
    from course_lib.data.templates import choose_template
    from course_lib.recipe import DataSettings, TrainingSettings
    from course_lib.training.batches import plan_steps

    settings = DataSettings(path=str(path), max_length=2048, packing="best-fit")
    training = TrainingSettings(batch_size=1, accumulation=8)
    template = choose_template(tokenizer)
    seconds: dict[str, float] = {}

    def timed(part: str, work: Callable[[], Result]) -> Result:
        start = time.perf_counter()
        done = work()
        seconds[part] = time.perf_counter() - start
        print(f"{part}: {seconds[part]:.1f} s", flush=True)
        return done

    timed("read", lambda: load_conversations(settings, report=DataReport()))
    dataset = timed("tokenise", lambda: load_dataset(settings, template=template, tokenizer=tokenizer))
    assert dataset.report.kept == rows
    plan = timed("plan packs", lambda: plan_steps(dataset.train, settings, training))
    tokens = timed(
        "go through all packs",
        lambda: sum(
            len(example.input_ids)
            for step in range(plan.steps_per_epoch)
            for batch in plan.micro_batches(step)
            for example in batch
        ),
    )
    assert tokens == int(dataset.train.lengths.sum())
    timed("load again from the cache", lambda: load_dataset(settings, template=template, tokenizer=tokenizer))
    return {
        "rows": rows,
        "tokens": tokens,
        "packs": len(plan.packs),
        "seconds": seconds,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_child_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "load_average": os.getloadavg()[0],
    }


if __name__ == "__main__":
    main()
