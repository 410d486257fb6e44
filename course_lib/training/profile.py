"""`course train --profile`: a trace of a few steps, and a page that says where their time went.

The first steps are left out: kernels are compiled and chosen in them, and memory is taken from the system.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from course_lib.files import atomic_folder
from course_lib.training.attention import describe_attention
from course_lib.training.distributed import process_count
from course_lib.training.events import Event, StepDone, StepsProfiled
from course_lib.training.memory import peak_memory_bytes
from course_lib.training.parts import recorded_parts
from course_lib.training.step_times import KINDS, ModelNumbers, StepTimes, step_times

if TYPE_CHECKING:
    from course_lib.training.run import Run

WARM_UP, PROFILED = 2, 3  # steps
FOLDER = "profile"  # in the work dir
TRACE, PAGE, NUMBERS = "trace.json.gz", "profile.txt", "profile.json"
LISTED = 15  # operations
NAME, BAR = 54, 24  # characters of an operation's name, and of the longest bar
READING = {  # what is said of a kind that is there
    "weights": "How to read it: products with weights are the work itself; all else is what it costs to train like this.",
    "waiting": "Much waiting means that the host cannot keep up: more tokens at a time help (training.batch_size, data.max_length).",
    "dequantise": "Dequantising takes as long for few tokens as for many: its share falls with more of them.",
}


@contextmanager
def profiled_steps(run: Run, steps: range, *, wanted: bool) -> Iterator[Iterable[int]]:
    """The steps, of which some are profiled while they are gone through; the same steps where it is not wanted.

    Of a run too short for warm-up and three steps, what is left of it is profiled, at least its last step.
    """
    if not wanted or not steps:
        yield steps
        return
    profiler = _StepProfiler(run, steps)
    run.listeners.append(profiler)
    try:
        yield profiler
    finally:
        run.listeners.remove(profiler)
        profiler.leave()


class _StepProfiler:
    """Goes through the steps, and profiles some; as a listener it takes note of the speed of the others."""

    def __init__(self, run: Run, steps: range) -> None:
        self.run, self.steps = run, steps
        warm_up = min(WARM_UP, len(steps) - 1)
        self.profiled = steps[warm_up : warm_up + PROFILED]
        self.before = 0.0  # tokens a second of the step before
        self._active = ExitStack()
        self._profiler: Any = None

    def __call__(self, event: Event) -> None:
        """Note a step's speed."""
        if isinstance(event, StepDone) and event.step == self.profiled[0]:  # counted from 1: the one before
            self.before = event.tokens_per_second

    def __iter__(self) -> Iterator[int]:
        for step in self.steps:
            if step == self.profiled[0]:
                self._enter()
            yield step
            if step == self.profiled[-1]:
                _wait_for_gpu()
                self.leave()
                self._write()

    def _enter(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it would write lines of its own to stderr
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profiler = torch.profiler.profile(activities=kinds, record_shapes=True)
        _wait_for_gpu()
        self._active.enter_context(self._profiler)
        self._active.enter_context(recorded_parts())

    def leave(self) -> None:
        """Profile no more."""
        self._active.close()

    def _write(self) -> None:
        run, first, last = self.run, self.profiled[0] + 1, self.profiled[-1] + 1
        tokens = sum(_tokens(run, step) for step in self.profiled) / len(self.profiled)
        memory = peak_memory_bytes()
        with atomic_folder(run.work_dir / FOLDER) as folder:
            raw = folder / "trace.json"
            self._profiler.export_chrome_trace(str(raw))
            times = step_times(json.loads(raw.read_bytes())["traceEvents"], _numbers(run))
            with raw.open("rb") as trace, gzip.open(folder / TRACE, "wb", compresslevel=5) as packed:
                shutil.copyfileobj(trace, packed)
            raw.unlink()
            profile = Profile(
                first_step=first,
                last_step=last,
                total_steps=run.plan.total_steps,
                model=run.recipe.model.name,
                computed_by=run.engine.description,
                attention=describe_attention(
                    flat=run.flat, device=run.accelerator.device, mixed_precision=run.accelerator.mixed_precision
                ),
                device=_device(times),
                tokens=tokens,
                tokens_per_second_before=self.before,
                memory_bytes=memory,
                times=times,
            )
            (folder / NUMBERS).write_text(json.dumps(asdict(profile), indent=1) + "\n", encoding="utf-8")
            (folder / PAGE).write_text(page(profile), encoding="utf-8")
        run.emit(StepsProfiled(step=last, first_step=first, wanted=PROFILED, path=run.work_dir / FOLDER / PAGE))


@dataclass(frozen=True)
class Profile:
    """What the page says. Times are those of one step, in seconds, the mean over those profiled."""

    first_step: int
    last_step: int
    total_steps: int
    model: str
    computed_by: str
    attention: str
    device: str
    tokens: float  # in a step, all processes together
    tokens_per_second_before: float  # of the step before, without the profiler; 0 where it was not told
    memory_bytes: int  # peak: allocated on the GPU, or resident on the CPU
    times: StepTimes


def page(profile: Profile) -> str:
    """The profile as text of one page."""
    times = profile.times
    speed = profile.tokens / times.seconds
    first, last = profile.first_step, profile.last_step
    steps = f"steps {first} to {last}" if first < last else f"step {last}"
    facts = {
        "a step": f"{_ms(times.seconds)} ms, {speed:,.0f} tokens/s ({profile.tokens:,.0f} tokens)",
        "memory": f"{profile.memory_bytes / 1e9:.2f} GB at the peak",
        "device": profile.device,
        "computed by": profile.computed_by,
        "attention by": profile.attention,
    }
    if before := profile.tokens_per_second_before:
        slower = f", so the profiler slows a step down by {before / speed - 1:.0%}" if before > speed else ""
        facts["unprofiled"] = f"{before:,.0f} tokens/s in step {first - 1}{slower}"
    lines = [f"Where a step's time went: {steps} of {profile.total_steps}, {profile.model}", ""]
    lines += [f"{name:14}{fact}" for name, fact in facts.items()]
    lines += ["", f"{'kind of work':24}{'ms a step':>10}{'share':>8}"]
    longest = max(times.kinds.values())
    for kind, seconds in times.kinds.items():
        bar = "█" * round(BAR * seconds / longest)
        lines.append(f"{KINDS[kind][0]:24}{_ms(seconds):>10}{seconds / times.seconds:8.1%}  {bar}".rstrip())
    total = sum(times.kinds.values())
    lines += [f"{'in all':24}{_ms(total):>10}{total / times.seconds:8.1%}", ""]
    lines += [f"{KINDS[kind][0]:24}{KINDS[kind][1]}" for kind in times.kinds]
    if times.hidden:
        lines.append(f"{'not counted':24}{_ms(times.hidden)} ms of copies that went on while kernels ran")
    lines.append(f"{'not counted':24}{_ms(times.between)} ms between two steps: evaluating, saving, telling")
    lines += ["", *(said for kind, said in READING.items() if kind in times.kinds), ""]
    listed, rest = times.operations[:LISTED], times.operations[LISTED:]
    heading = f"the {len(listed)} operations that took longest"
    lines.append(f"{heading:{NAME}}{'ms a step':>10}{'share':>8}{'calls':>8}  kind")
    for one in listed:
        name = one.name.removeprefix("aten::")
        name = name if len(name) <= NAME else name[: NAME - 1] + "…"
        share = one.seconds / times.seconds
        lines.append(f"{name:{NAME}}{_ms(one.seconds):>10}{share:8.1%}{one.calls:8,.0f}  {KINDS[one.kind][0]}")
    if rest:
        seconds, calls = sum(one.seconds for one in rest), sum(one.calls for one in rest)
        lines.append(f"{f'{len(rest)} others':{NAME}}{_ms(seconds):>10}{seconds / times.seconds:8.1%}{calls:8,.0f}")
    lines += ["", f"Every operation of these steps, one after another: {TRACE}; open it in https://ui.perfetto.dev"]
    return "\n".join(lines) + "\n"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}"


def _numbers(run: Run) -> ModelNumbers:
    model = run.bare_model
    ranks = {config.r for config in getattr(model, "peft_config", {}).values()}
    return ModelNumbers(frozenset(ranks), int(getattr(model.config, "vocab_size", 0)))


def _tokens(run: Run, step: int) -> int:
    """Tokens of a step, all processes together; of padded rows, padding left out."""
    return sum(len(example.input_ids) for batch in run.plan.micro_batches(step) for example in batch)


def _device(times: StepTimes) -> str:
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {threads} thread{'s' * (threads != 1)}"
    if process_count() > 1:
        name += f", that of the first of {process_count()} processes"
    if torch.cuda.is_available() and times.device == "CPU":
        name += ", of which the profiler saw nothing: all times are the host's"
    return name


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
