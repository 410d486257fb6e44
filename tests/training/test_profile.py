"""course train --profile: the kinds of work add up to the step, on a CPU and in a GPU's trace, and training is what it was."""

from __future__ import annotations

import gzip
import json
import os
import signal
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from course_runner import Course

from course_lib.errors import CourseError
from course_lib.training.events import StepDone, StepsProfiled
from course_lib.training.fused import FusedEngine
from course_lib.training.interrupt import Interrupted
from course_lib.training.listeners import read_metrics
from course_lib.training.loop import train
from course_lib.training.parts import part, part_of, recorded_parts
from course_lib.training.step_times import KINDS, ModelNumbers, StepTimes, step_times

NUMBERS = ModelNumbers(frozenset({4}), 259)


def profile_in(work_dir: Path) -> dict[str, Any]:
    return json.loads((work_dir / "profile" / "profile.json").read_text())


def figures(work_dir: Path) -> list[tuple[int, float, float]]:
    return [(e["step"], e["loss"], e["grad_norm"]) for e in read_metrics(work_dir) if e["event"] == "StepDone"]


def adds_up(times: dict[str, Any]) -> bool:
    """Kinds to the step; on a CPU, operations and waiting too."""
    kinds, operations = times["kinds"], times["operations"]
    listed = sum(one["seconds"] for one in operations) + kinds["waiting"]
    return (
        sum(kinds.values()) == pytest.approx(times["seconds"], rel=1e-6)
        and min(kinds.values()) >= 0
        and kinds.keys() <= KINDS.keys()
        and (times["device"] == "GPU" or listed == pytest.approx(times["seconds"], rel=1e-6))
    )


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_profiled_run_is_the_same_run(dropout: float, make: Any, tmp_path: Path) -> None:
    recipe = make(lora={"dropout": dropout}, data={"held_out": 2}, evaluation={"every": 1})
    events: list[object] = []
    train(recipe, work_dir=tmp_path / "plain")
    train(recipe, work_dir=tmp_path / "profiled", profile=True, listeners=[events.append])
    assert figures(tmp_path / "profiled") == figures(tmp_path / "plain")
    adapters = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("plain", "profiled")
    ]
    assert adapters[0] == adapters[1]
    assert not (tmp_path / "plain" / "profile").exists()

    (told,) = [event for event in events if isinstance(event, StepsProfiled)]
    assert (told.first_step, told.step) == (3, 5)
    profile, times = profile_in(tmp_path / "profiled"), profile_in(tmp_path / "profiled")["times"]
    assert (profile["first_step"], profile["last_step"], profile["total_steps"]) == (3, 5, 6)
    assert adds_up(times)
    assert times["kinds"].keys() >= {"weights", "adapters", "attention", "head", "optimizer", "elementwise", "waiting"}
    assert "dequantise" not in times["kinds"]
    assert times["between"] > 0  # the held-out loss after each step is no part of one
    tokens = [event.tokens for event in events if isinstance(event, StepDone) and 3 <= event.step <= 5]
    assert profile["tokens"] == pytest.approx(sum(tokens) / 3)
    speed = {event.step: event.tokens_per_second for event in events if isinstance(event, StepDone)}
    assert profile["tokens_per_second_before"] == speed[2]


def test_the_page_and_the_trace(make: Any, tmp_path: Path, course: Course) -> None:
    make().save(tmp_path / "my.yaml")
    result = course("train", "my.yaml", "--profile")
    assert result.returncode == 0, result.stderr
    assert "profiled 3 steps, 3 to 5: work_dirs/my/profile/profile.txt" in result.stderr
    assert "STAGE" not in result.stderr + result.stdout  # the profiler's own lines
    assert "USDT" not in result.stderr + result.stdout
    folder = tmp_path / "work_dirs" / "my" / "profile"
    assert {path.name for path in folder.iterdir()} == {"profile.txt", "profile.json", "trace.json.gz"}
    page = (folder / "profile.txt").read_text()
    assert page.startswith("Where a step's time went: steps 3 to 5 of 6, tiny\n")
    assert "100.0%" in page
    assert "the 15 operations that took longest" in page
    assert len(page.splitlines()) < 66
    assert max(map(len, page.splitlines())) <= 120
    with gzip.open(folder / "trace.json.gz") as trace:
        events = json.load(trace)["traceEvents"]
    assert sum(event["name"] == "part: step" for event in events) == 3
    read = step_times(events, NUMBERS)
    assert read.kinds == profile_in(folder.parent)["times"]["kinds"]


@pytest.mark.parametrize(
    ("steps", "profiled"), [(1, (1, 1)), (2, (2, 2)), (3, (3, 3)), (4, (3, 4)), (5, (3, 5)), (7, (3, 5))]
)
def test_short_runs(steps: int, profiled: tuple[int, int], make: Any, tmp_path: Path, course: Course) -> None:
    make(training={"max_steps": steps}).save(tmp_path / "my.yaml")
    result = course("train", "my.yaml", "--profile")
    found = profile_in(tmp_path / "work_dirs" / "my")
    assert (found["first_step"], found["last_step"]) == profiled
    assert adds_up(found["times"])
    assert ("(the run has not 3 after warm-up)" in result.stderr) == (steps < 5)


def test_a_resumed_run_is_profiled_after_its_own_warm_up(make: Any, tmp_path: Path) -> None:
    def stop(event: object) -> None:
        if isinstance(event, StepDone) and event.step == 4:  # in the midst of the profile
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="after step 4"):
        train(make(), work_dir=tmp_path / "run", profile=True, listeners=[stop])
    assert not (tmp_path / "run" / "profile").exists()
    train(make(), work_dir=tmp_path / "run", profile=True, resume=True)
    assert profile_in(tmp_path / "run")["first_step"] == 6
    train(make(), work_dir=tmp_path / "straight")
    assert figures(tmp_path / "run") == figures(tmp_path / "straight")
    train(make(), work_dir=tmp_path / "run", profile=True, resume=True)  # no step is left


def test_a_run_that_fails_in_its_profile(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_loss, calls = FusedEngine.loss, count(1)
    monkeypatch.setattr(
        FusedEngine, "loss", lambda self, batch: real_loss(self, batch) * (float("nan") if next(calls) == 4 else 1)
    )
    with pytest.raises(CourseError, match="step 4: the loss is nan"):
        train(make(), work_dir=tmp_path / "run", profile=True)
    assert not (tmp_path / "run" / "profile").exists()
    monkeypatch.undo()
    train(make(), work_dir=tmp_path / "again", profile=True)  # the profiler is free
    assert adds_up(profile_in(tmp_path / "again")["times"])


@pytest.mark.parametrize(
    ("sections", "kinds"),
    [
        ({"lora": None}, {"weights", "attention", "head", "optimizer"}),
        ({"lora": {"r": 5}, "model": {"dtype": "int8"}}, {"weights", "adapters", "attention", "head", "optimizer"}),
        ({"lora": {"r": 5}, "model": {"dtype": "nf4"}}, {"weights", "adapters", "attention", "dequantise"}),
    ],
)
def test_the_models_own_layers(sections: dict[str, Any], kinds: set[str], make: Any, tmp_path: Path) -> None:
    """Products are told apart by their sizes, all else by the operations' names."""
    train(make(**sections), work_dir=tmp_path / "run", profile=True)
    times = profile_in(tmp_path / "run")["times"]
    assert "the model's own layers" in profile_in(tmp_path / "run")["computed_by"]
    assert adds_up(times)
    assert times["kinds"].keys() >= kinds
    assert ("adapters" in times["kinds"]) == (sections["lora"] is not None)


def test_parts_are_nothing_without_a_profile() -> None:
    @part_of("head")
    def two() -> torch.Tensor:
        return torch.ones(2) + 1

    def names() -> set[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler, part("weights"):
            two()
        return {event.name for event in profiler.events() if event.name.startswith("part: ")}

    assert part("weights") is part("head")
    assert names() == set()
    with recorded_parts():
        assert names() == {"part: weights", "part: head"}
    assert names() == set()


class GpuTrace:
    """A trace as kineto writes it, made by hand: milliseconds in, microseconds out."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 1, "ts": 0}]
        self.number = count(1)

    def add(self, category: str, name: str, start: float, end: float, thread: int = 1, **arguments: Any) -> None:
        times = {"ts": start * 1000, "dur": (end - start) * 1000}
        self.events.append(
            {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread, **times, "args": arguments}
        )

    def launch(
        self,
        name: str,
        at: float,
        start: float,
        end: float,
        *,
        category: str = "kernel",
        by: str = "cuda_runtime",
        thread: int = 1,
    ) -> None:
        """Something launched on the host at one moment, and run by the GPU from another on."""
        number = next(self.number)
        self.add(by, "cudaLaunchKernel", at, at + 0.01, thread, correlation=number)
        self.add(category, name, start, end, 7, stream=7, correlation=number)

    def read(self) -> StepTimes:
        return step_times(self.events, NUMBERS)


def test_a_gpus_moments_are_each_of_one_kind() -> None:
    trace = GpuTrace()
    trace.add("user_annotation", "part: step", 0, 40)
    trace.add("user_annotation", "part: weights", 1, 4)
    trace.add("cpu_op", "aten::mm", 2, 3, **{"Input Dims": [[8, 16], [16, 16]]})
    trace.launch("nvjet_tst_128x128", 2.5, 10, 20)
    trace.add("user_annotation", "part: adapters", 3.2, 3.8)  # in the part before it
    trace.launch("void cutlass::Kernel2<cutlass_80>(Params)", 3.5, 20, 25, by="cuda_driver")
    trace.launch("_add_rms_norm_kernel", 5, 25, 28, by="cuda_driver")  # Triton's, of no operation
    trace.launch("_dequantise_nf4_kernel", 6, 28, 30)
    trace.add("user_annotation", "part: attention", 7, 8, thread=2)  # in autograd's thread
    trace.launch("flash_bwd_kernel", 7.5, 30, 36, thread=2)
    trace.launch("Memcpy HtoD (Pinned -> Device)", 8, 12, 16, category="gpu_memcpy")  # behind the product
    trace.launch("Memcpy HtoD (Pinned -> Device)", 9, 35, 40, category="gpu_memcpy")  # 1 behind attention, 4 alone
    trace.launch("ncclDevKernel_AllReduce_Sum", 9, 39, 42)  # 1 behind the copy, 2 alone
    trace.add("cpu_op", "aten::add_", 10, 11)
    trace.launch("void at::native::vectorized_elementwise_kernel<4>(int)", 10.5, 45, 50)  # after 3 of waiting
    times = trace.read()
    assert {kind: round(seconds * 1e3, 6) for kind, seconds in times.kinds.items()} == {
        **{"weights": 10, "adapters": 5, "attention": 6, "dequantise": 2, "elementwise": 3 + 5},
        **{"copies": 4, "communication": 2},
    }
    # from 42 to 45 the GPU had nothing to do, and the host was out of the step
    assert times.between * 1e3 == pytest.approx(3)
    assert times.seconds * 1e3 == pytest.approx(50 - 10 - 3)
    assert times.hidden * 1e3 == pytest.approx(4 + 1 + 1)
    assert times.device == "GPU"
    by_name = {one.name: one for one in times.operations}
    assert by_name["mm: nvjet_tst_128x128"].kind == "weights"
    assert by_name["Kernel2"].seconds * 1e3 == pytest.approx(5)
    assert by_name["add_: vectorized_elementwise_kernel"].calls == 1


def test_a_gpu_that_waits_and_what_is_between_steps() -> None:
    trace = GpuTrace()
    for step in (0, 1):
        start = 100.0 * step
        trace.add("user_annotation", "part: step", start, start + 50)
        trace.launch("one_kernel", start + 1, start + 2, start + 12)
        trace.launch("one_kernel", start + 30, start + 31, start + 41)  # 19 of waiting before it
    trace.launch("of_an_evaluation", 60, 61, 71)
    times = trace.read()
    assert times.steps == 2
    # from 41 to 50 and from 100 to 102 the GPU waits for a host that is in a step
    assert times.kinds["waiting"] * 2e3 == pytest.approx(19 + 9 + 2 + 19)
    assert times.kinds["elementwise"] * 2e3 == pytest.approx(4 * 10)
    assert times.between * 2e3 == pytest.approx(100 - 50)
    assert times.seconds * 2e3 == pytest.approx((141 - 2) - 50)


def test_products_of_the_models_own_layers_on_a_gpu() -> None:
    trace = GpuTrace()
    trace.add("user_annotation", "part: step", 0, 50)
    for number, (sizes, name) in enumerate(
        [([[30, 64], [64, 64]], "aten::mm"), ([[30, 64], [64, 4]], "aten::mm"), ([[30, 64], [64, 259]], "aten::addmm")]
    ):
        trace.add("cpu_op", name, number, number + 0.5, **{"Input Dims": sizes})
        trace.launch("gemm", number + 0.1, number + 10, number + 11)
    trace.launch("no_launch", 5, 13, 14)
    trace.events = [event for event in trace.events if event["ts"] != 5000]  # its launch was not recorded
    assert {kind: round(seconds * 1e3, 3) for kind, seconds in trace.read().kinds.items()} == {
        **{"weights": 1, "adapters": 1, "head": 1, "elementwise": 1}
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("sections", [{}, {"lora": None}, {"training": {"gradient_checkpointing": True}}])
def test_on_a_gpu(sections: dict[str, Any], make: Any, tmp_path: Path) -> None:
    recipe = make(**{"model": {"dtype": "bfloat16"}, **sections})
    train(recipe, work_dir=tmp_path / "plain")
    train(recipe, work_dir=tmp_path / "run", profile=True)
    losses = [[loss for _, loss, _ in figures(tmp_path / name)] for name in ("run", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    times = profile_in(tmp_path / "run")["times"]
    assert times["device"] == "GPU"
    assert adds_up(times)
    assert times["kinds"].keys() >= {"weights", "attention", "head", "optimizer", "elementwise", "waiting"}
