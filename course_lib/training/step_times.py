"""Where a step's time went, read out of a trace of torch.profiler.

Every moment of a step is given to one kind of work, so that the kinds add up to the step. On a GPU a moment is what a kernel of its
does, and of a copy only while no kernel runs; what is left is waiting for the host. On a CPU it is the innermost operation, and what is
left is Python between two of them.

Which kind a kernel is follows from where it was launched: in a part that the code names (parts.py), else by the operation's name.

Format of the trace: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (Chrome's), with the categories
and the correlation ids of kineto (https://github.com/pytorch/kineto).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from course_lib.training.parts import PREFIX, STEP

# kind: its title, and what is in it. The first six are also the parts that the code names.
KINDS = {
    "weights": ("products with weights", "W x, and its gradient by x; an adapter that is joined to W is in there"),
    "adapters": ("products with adapters", "A x and B (A x), and all gradients of A and B"),
    "attention": ("attention", "forward and backward, without the products before and after it"),
    "head": ("head and loss", "logits of the trained positions, cross entropy, and the gradient of both"),
    "dequantise": ("dequantising", "4-bit weights made into numbers that can be multiplied"),
    "optimizer": ("optimizer", "clipping the gradient, and the step"),
    "elementwise": ("element-wise", "norms, rotation, SwiGLU, sums, dropout, and all that is nothing else here"),
    "copies": ("copies", "between types and places; to or from the host where nothing else runs"),
    "communication": ("between processes", "gradients or weights from GPU to GPU, where nothing else runs"),
    "waiting": ("waiting", "for the host: Python, and what it reads and plans, between two operations"),
}
OUTSIDE = "outside"  # between the steps: evaluation, saving
BY_NAME = {
    "communication": r"nccl|c10d::|all_?reduce|all_?gather",
    "attention": r"attention|attn|flash|fmha|sdpa",
    "head": r"cross_entropy|log_?softmax|nll_loss",
    "dequantise": r"dequant",
    "optimizer": r"adam|optimizer|foreach|multi_tensor",
    "copies": r"memcpy|memset|::copy_|_to_copy|::clone|::cat\b|::contiguous",
}
PRODUCT = r"\b(b?mm|addmm_?|baddbmm_?|linear|matmul|gemm\w*)\b|gemm|cutlass|nvjet|xmma"
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")


class ModelNumbers(NamedTuple):
    """What tells the products of a model's own layers apart, by their shapes."""

    ranks: frozenset[int]
    vocabulary: int


@dataclass(frozen=True)
class Operation:
    """Operations of one name and kind."""

    name: str
    kind: str
    seconds: float  # a step
    calls: float  # a step


@dataclass(frozen=True)
class StepTimes:
    """A step's seconds, the mean over some steps."""

    steps: int
    seconds: float
    device: str  # GPU or CPU: whose time is meant
    kinds: dict[str, float]  # in the order of KINDS; their sum is `seconds`
    operations: list[Operation]  # the longest first
    hidden: float  # copies and communication while kernels ran, in no kind
    between: float  # evaluation and saving between the steps, in no kind


@dataclass
class _Host:
    """An event of a host thread, and what it is in."""

    name: str
    start: float  # microseconds, as all times of a trace
    end: float
    operation: str = ""  # the innermost one
    part: str = ""  # the innermost one
    dims: list[Any] = field(default_factory=list)
    inside: float = 0.0  # of `end - start` taken by operations within


class _Span(NamedTuple):
    start: float
    end: float
    kind: str


def step_times(events: Sequence[dict[str, Any]], model: ModelNumbers) -> StepTimes:
    """Read a trace's events, with at least one step among them. Without any of a GPU, the times are the host's."""
    complete = [event for event in events if event.get("ph") == "X" and "dur" in event]
    threads, launches = _hosts(complete)
    main, steps = next(
        ((hosts, found) for hosts in threads if (found := [one for one in hosts if one.name == PREFIX + STEP])),
        ([], []),
    )
    assert steps, "no step in the trace"
    on_device = [event for event in complete if event.get("cat") in ON_DEVICE]
    return _of_gpu(on_device, launches, steps, model) if on_device else _of_cpu(main, steps, model)


def _hosts(events: Iterable[dict[str, Any]]) -> tuple[list[list[_Host]], dict[int, _Host]]:
    """Events of each host thread in their order, and launches by correlation id; each knows what it is in."""
    by_thread: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") in ("cpu_op", "user_annotation", *LAUNCHES):
            by_thread[event["pid"], event["tid"]].append(event)
    threads, launches = [], {}
    for own in by_thread.values():
        hosts: list[_Host] = []
        stack: list[_Host] = []
        for event in sorted(own, key=lambda event: (event["ts"], -event["dur"])):
            host = _Host(event["name"], event["ts"], event["ts"] + event["dur"])
            while stack and stack[-1].end <= host.start:
                stack.pop()
            around = stack[-1] if stack else None
            arguments = event.get("args", {})
            if around:
                host.part, host.operation, host.dims = around.part, around.operation, around.dims
            if event["cat"] == "cpu_op" and _computes(host.name):
                _take_from_operation(stack, host.end - host.start)
                host.operation, host.dims = host.name, arguments.get("Input Dims", [])
            elif event["cat"] in LAUNCHES:
                launches[arguments.get("correlation", 0)] = host
                continue
            elif host.name.startswith(PREFIX):
                host.part = host.name.removeprefix(PREFIX)
            hosts.append(host)
            stack.append(host)
        threads.append(hosts)
    return threads, launches


def _computes(name: str) -> bool:
    """Whether an operation is one, and no node of autograd's, which is Python or bookkeeping around some."""
    return "::" in name and not name.startswith("autograd::")


def _take_from_operation(stack: list[_Host], duration: float) -> None:
    """What an operation takes is no time of the operation that it is in, annotations between the two or not."""
    for around in reversed(stack):
        if around.operation == around.name:
            around.inside += duration
            return


def _of_cpu(hosts: list[_Host], steps: list[_Host], model: ModelNumbers) -> StepTimes:
    times: dict[str, float] = defaultdict(float)
    operations: dict[tuple[str, str], list[float]] = defaultdict(list)
    inside = _Inside(steps)
    for host in hosts:
        if host.operation == host.name and inside.at(host.start):
            kind = _kind(host.part, host.operation, host.dims, model)
            times[kind] += (own := host.end - host.start - host.inside)
            operations[host.name, kind].append(own)
    total = sum(step.end - step.start for step in steps)
    times["waiting"] = total - sum(times.values())
    between = steps[-1].end - steps[0].start - total
    return _summary(times, operations, steps=len(steps), device="CPU", hidden=0.0, between=between)


def _of_gpu(
    events: list[dict[str, Any]], launches: dict[int, _Host], steps: list[_Host], model: ModelNumbers
) -> StepTimes:
    operations: dict[tuple[str, str], list[float]] = defaultdict(list)
    computing: list[_Span] = []
    moving: list[_Span] = []  # may run while something computes, on another stream
    inside = _Inside(steps)
    for event in events:
        launch = launches.get(event.get("args", {}).get("correlation", -1))
        start, end = event["ts"], event["ts"] + event["dur"]
        kind = _kind_on_gpu(event, launch, model)
        behind = kind == "communication" or event["cat"] != "kernel"
        if inside.at(launch.start if launch else start):
            operations[_short(event["name"], launch), kind].append(end - start)
        else:
            kind = OUTSIDE
        (moving if behind else computing).append(_Span(start, end, kind))
    own = [span for span in computing + moving if span.kind != OUTSIDE]
    whole = (min(span.start for span in own), max(span.end for span in own))
    times, gaps = _fill([whole], computing)
    alone, gaps = _fill(gaps, moving)
    moved = sum(span.end - span.start for span in moving if span.kind != OUTSIDE)
    hidden = moved - sum(seconds for kind, seconds in alone.items() if kind != OUTSIDE)
    for kind, seconds in alone.items():
        times[kind] += seconds
    for start, end in gaps:
        waited = inside.overlap(start, end)
        times["waiting"] += waited
        times[OUTSIDE] += end - start - waited
    between = times.pop(OUTSIDE, 0.0)
    return _summary(times, operations, steps=len(steps), device="GPU", hidden=hidden, between=between)


class _Inside:
    """Which moments are in a step, by the clock of the host."""

    def __init__(self, steps: list[_Host]) -> None:
        self.starts, self.ends = [step.start for step in steps], [step.end for step in steps]

    def at(self, moment: float) -> bool:
        """Whether a moment is."""
        number = bisect_right(self.starts, moment) - 1
        return number >= 0 and moment < self.ends[number]

    def overlap(self, start: float, end: float) -> float:
        """How much of a time is."""
        pairs = zip(self.starts, self.ends, strict=True)
        return sum(max(0.0, min(end, its_end) - max(start, its_start)) for its_start, its_end in pairs)


def _fill(gaps: list[tuple[float, float]], spans: list[_Span]) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """Give the moments of the gaps to spans, the one that began first where there are several: times by kind, and what is left."""
    times: dict[str, float] = defaultdict(float)
    left = []
    spans, first = sorted(spans), 0
    for start, end in gaps:
        while first < len(spans) and spans[first].end <= start:
            first += 1
        at = start
        for span in spans[first:]:
            if span.start >= end:
                break
            begins, ends = max(span.start, at), min(span.end, end)
            if ends > begins:
                if begins > at:
                    left.append((at, begins))
                times[span.kind] += ends - begins
                at = ends
        if at < end:
            left.append((at, end))
    return times, left


def _kind_on_gpu(event: dict[str, Any], launch: _Host | None, model: ModelNumbers) -> str:
    name = event["name"]
    if re.search(BY_NAME["communication"], name.lower()):
        return "communication"
    if event["cat"] != "kernel":
        return "copies"
    if launch and (launch.part in KINDS or launch.operation):
        return _kind(launch.part, launch.operation, launch.dims, model)
    return _kind("", name, [], model)


def _kind(part: str, operation: str, dims: list[Any], model: ModelNumbers) -> str:
    """Of the named part; else by the operation, and for a product by whether a rank or the vocabulary is among its sizes."""
    if part in KINDS:
        return part
    name = operation.lower()
    for kind, pattern in BY_NAME.items():
        if re.search(pattern, name):
            return kind
    if not re.search(PRODUCT, name):
        return "elementwise"
    sizes = {size for shape in dims if isinstance(shape, list) and len(shape) > 1 for size in shape}
    if model.vocabulary in sizes:
        return "head"
    return "adapters" if sizes & model.ranks else "weights"


def _short(kernel: str, launch: _Host | None) -> str:
    """A kernel's name without types and arguments, after the operation that launched it."""
    bare = re.sub(r"[<(].*", "", kernel.removeprefix("void ")).rpartition("::")[2]
    operation = launch.operation.removeprefix("aten::") if launch else ""
    return f"{operation}: {bare}" if operation else bare


def _summary(
    times: dict[str, float],
    operations: dict[tuple[str, str], list[float]],
    *,
    steps: int,
    device: str,
    hidden: float,
    between: float,
) -> StepTimes:
    unit = 1e6 * steps
    listed = [Operation(name, kind, sum(own) / unit, len(own) / steps) for (name, kind), own in operations.items()]
    return StepTimes(
        steps=steps,
        seconds=sum(times.values()) / unit,
        device=device,
        kinds={kind: times[kind] / unit for kind in KINDS if times.get(kind)},
        operations=sorted(listed, key=lambda one: -one.seconds),
        hidden=hidden / unit,
        between=between / unit,
    )
