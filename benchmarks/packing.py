"""Packing: this library beside TRL's `pack_dataset`, on the same rows, in one process.

    python benchmarks/packing.py [--rows 1000000] [--pairs 3] [--out benchmarks/results/packing.json]

Rows have log-normal lengths (mean 310, sigma 0.8), at least 1 and cut at 2,048 tokens, and two int32 columns, input ids
and labels, held in memory; both sides read the same buffers, make their packs in memory and run on one thread.

| side | what is timed |
|---|---|
| ours | `plan_packs` (best-fit) over all rows, and `pack_tokens` for both columns |
| TRL, in thousands | `pack_dataset(strategy="bfd")` as it comes: each 1,000 rows packed by themselves |
| TRL, all at once | the same over all rows together, which needs fewer packs |

After one warm-up of each side on a few rows, each pair runs them one after the other, every second pair in reverse.
Each pack made is checked once: the same tokens, no pack over the length. The planner's time and memory are measured
apart, the memory with `tracemalloc` in a run of its own, because it slows what it watches.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from course_lib.data.packing import pack_tokens, plan_packs

MEAN, SIGMA, MAX_LENGTH = 310, 0.8, 2048
COLUMNS = ("input_ids", "labels")


def make_rows(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Return lengths, int32 (rows,); offsets, int64 (rows + 1,); and the columns, int32 (tokens,), end to end."""
    random = np.random.RandomState(seed)
    lengths = np.exp(np.log(MEAN) - SIGMA**2 / 2 + random.normal(scale=SIGMA, size=count))
    lengths = np.clip(lengths.round(), 1, MAX_LENGTH).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    ids = np.arange(offsets[-1], dtype=np.int32)  # each token a number of its own: a lost or doubled one shows
    return lengths, offsets, {"input_ids": ids, "labels": -ids}


def pack_ours(lengths: np.ndarray, offsets: np.ndarray, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Plan and move; return the packed columns and where each pack starts."""
    plan = plan_packs(lengths, max_length=MAX_LENGTH, strategy="best-fit")
    packed = {name: pack_tokens(plan, column, offsets) for name, column in columns.items()}
    return {"offsets": plan.token_offsets(), **packed}


def make_trl(offsets: np.ndarray, columns: dict[str, np.ndarray]) -> Callable[[int], Any]:
    """Wrap the same buffers as a Dataset; return a function that packs it, `batch_size` rows at a time."""
    try:
        import datasets
        import pyarrow
        from trl import pack_dataset
    except ImportError as error:
        raise SystemExit(f"{error}; the comparison needs TRL: pip install trl==1.16.0, or add --no-trl") from error
    datasets.disable_progress_bars()
    pyarrow.set_cpu_count(1)
    edges = pyarrow.array(offsets.astype(np.int32))
    table = pyarrow.table(
        {name: pyarrow.ListArray.from_arrays(edges, pyarrow.array(column)) for name, column in columns.items()}
    )
    dataset = datasets.Dataset(table)
    return lambda batch_size: pack_dataset(
        dataset, seq_length=MAX_LENGTH, strategy="bfd", map_kwargs={"batch_size": batch_size}
    )


def check(offsets: np.ndarray, ids: np.ndarray, labels: np.ndarray, tokens: int) -> int:
    """Return the number of packs, after seeing that they hold each token once and none is too long."""
    assert np.diff(offsets).max() <= MAX_LENGTH
    seen = np.zeros(tokens, dtype=bool)
    seen[ids] = True
    assert len(ids) == tokens
    assert seen.all()
    assert all(
        np.array_equal(labels[at : at + 1_000_000], -ids[at : at + 1_000_000]) for at in range(0, tokens, 1_000_000)
    )
    return len(offsets) - 1


def packs_of_trl(packed: Any, tokens: int) -> int:
    """`check` for a packed Dataset, whose columns come in chunks."""
    chunks = {name: packed.data.column(name).chunks for name in COLUMNS}
    sizes = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in chunks["input_ids"]])
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    ids, labels = (np.concatenate([chunk.flatten().to_numpy() for chunk in chunks[name]]) for name in COLUMNS)
    return check(offsets, ids, labels, tokens)


def measure_plan(lengths: np.ndarray, runs: int = 5) -> dict[str, Any]:
    """Seconds, quality and peak memory of the planner alone."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        plan = plan_packs(lengths, max_length=MAX_LENGTH, strategy="best-fit")
        seconds.append(time.perf_counter() - start)
    report = plan.report()
    tracemalloc.start()
    plan_packs(lengths, max_length=MAX_LENGTH, strategy="best-fit")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "seconds": seconds,
        "packs": report.packs,
        "packs_at_least": report.packs_at_least,
        "over_bound_percent": 100 * (report.packs / report.packs_at_least - 1),
        "fill_share": report.fill_share,
        "peak_mb": peak / 1e6,
    }


def compare(sides: dict[str, Callable[[], Any]], count: dict[str, Callable[[Any], int]], pairs: int) -> dict[str, Any]:
    """Time every side in every pair; count packs in the first."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    packs: dict[str, int] = {}
    for number in range(pairs):
        for side in list(sides)[:: 1 if number % 2 == 0 else -1]:
            start = time.perf_counter()
            packed = sides[side]()
            seconds[side].append(time.perf_counter() - start)
            if side not in packs:
                packs[side] = count[side](packed)
            del packed
            gc.collect()
            print(f"pair {number + 1}: {side:18} {seconds[side][-1]:7.2f} s", flush=True)
    return {side: {"seconds": seconds[side], "packs": packs[side]} for side in sides}


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    plan = result["plan"]
    print(f"\n{result['rows']:,} rows, {result['tokens']:,} tokens, packs of {MAX_LENGTH:,}")
    print(f"planning alone: {statistics.median(plan['seconds']):.3f} s, peak {plan['peak_mb']:.0f} MB\n")
    print(f"{'':18} {'seconds':>8} {'packs':>8} {'over the bound':>15} {'ours is faster by':>18}")
    for side, part in result["sides"].items():
        over = 100 * (part["packs"] / plan["packs_at_least"] - 1)
        ratio = f"{part['ratio_median']:.1f}" if "ratio_median" in part else ""
        print(f"{side:18} {statistics.median(part['seconds']):8.2f} {part['packs']:8,} {over:14.4f}% {ratio:>18}")


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--no-trl", action="store_true", help="measure this library alone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/packing.json"))
    arguments = parser.parse_args()
    lengths, offsets, columns = make_rows(arguments.rows)
    tokens = int(offsets[-1])
    sides: dict[str, Callable[[], Any]] = {"ours": lambda: pack_ours(lengths, offsets, columns)}
    count = {"ours": lambda packed: check(packed["offsets"], *(packed[name] for name in COLUMNS), tokens)}
    few = make_rows(2000)
    pack_ours(*few)
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    if not arguments.no_trl:
        make_trl(*few[1:])(1000)
        pack_with_trl = make_trl(offsets, columns)
        for side, batch_size in (("TRL, in thousands", 1000), ("TRL, all at once", arguments.rows)):
            sides[side] = lambda batch_size=batch_size: pack_with_trl(batch_size)
            count[side] = lambda packed: packs_of_trl(packed, tokens)
        import datasets
        import pyarrow
        import trl

        versions |= {"trl": trl.__version__, "datasets": datasets.__version__, "pyarrow": pyarrow.__version__}
    plan = measure_plan(lengths)
    measured = compare(sides, count, arguments.pairs)
    for side in list(measured)[1:]:
        ratios = [
            theirs / ours for theirs, ours in zip(measured[side]["seconds"], measured["ours"]["seconds"], strict=True)
        ]
        measured[side] |= {
            "ratio_median": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    result = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "nice": os.nice(0),
        },
        "versions": versions,
        "rows": arguments.rows,
        "tokens": tokens,
        "lengths": {"mean": MEAN, "sigma": SIGMA, "max_length": MAX_LENGTH, "seed": 0},
        "plan": plan,
        "sides": measured,
        "peak_resident_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    show(result)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
