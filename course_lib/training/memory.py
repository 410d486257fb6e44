"""Peak memory of a run, and what is said when there is too little."""

from __future__ import annotations

import resource
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from course_lib.errors import CourseError
from course_lib.sizes import in_gib

if TYPE_CHECKING:
    from course_lib.recipe import Recipe

OF_SYSTEM = "can't allocate memory"
SAID = ("out of memory", OF_SYSTEM, "alloc_failed")
WITHOUT_PREDICTION = (
    "lower training.batch_size, data.max_length or lora.r, set training.gradient_checkpointing=true, "
    "or choose a smaller model.name or model.dtype=nf4"
)
LESS = 0.95  # of what the run that failed was predicted to need


def reset_peak_memory() -> None:
    """Give back what loading left reserved, and start measuring anew; a process's resident peak cannot be reset."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes() -> int:
    """Peak bytes allocated on the GPU, or resident in memory without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in kilobytes


@contextmanager
def memory_errors(recipe: Recipe, *, shard: bool = False, foretold: bool = True) -> Iterator[None]:
    """Say in one line that memory ran out, and what to set so that it does not.

    Args:
        shard: the frozen layers are spread over the GPUs.
        foretold: false where `predict_memory` does not apply, as under DeepSpeed.

    Raises:
        CourseError: memory ran out on the GPU, or the system gave none.
    """
    try:
        yield
    except (MemoryError, RuntimeError, CourseError) as error:
        reason = error.__cause__ if isinstance(error, CourseError) else error  # load_model has said it in its own words
        if not _is_of_memory(reason):
            raise
        of_gpu = not isinstance(reason, MemoryError) and OF_SYSTEM not in str(reason)
        advice = _advice(recipe, shard) if foretold and of_gpu else ""
        raise CourseError(f"memory ran out: {advice or WITHOUT_PREDICTION}") from error


def _is_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out: torch has an error of its own for a GPU only, and libraries beside it say it in theirs."""
    said = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in SAID)
    )


def _advice(recipe: Recipe, shard: bool) -> str:
    """What makes the run fit into this GPU, by prediction; empty where none can be made. It never fails: there is an error already."""
    try:
        from course_lib.model_shape import ModelShape
        from course_lib.training.distributed import process_count
        from course_lib.training.memory_plan import plan_within
        from course_lib.training.memory_prediction import predict_memory

        shape, gpus = ModelShape.of(recipe.model.name), process_count()
        predicted = predict_memory(recipe, shape, gpus=gpus, shard=shard)
        there = _memory_of_gpu() + predicted.libraries  # these are taken already, and counted in what is needed
        # it did run out: what is proposed must take less than what was tried
        found = plan_within(recipe, shape, min(there, round(LESS * predicted.needed)), gpus=gpus, shard=shard)
        said = f"the run takes {in_gib(predicted.needed)} and this GPU has {in_gib(there)} for it"
        if not found:
            return f"{said}; no setting makes it fit: take a smaller model.name"
        settings = " ".join(f"--set {shlex.quote(override)}" for override in found[0].overrides)
        return f"{said}; it fits, in {found[0].slow_down:.2f}× the time, with {settings} (course plan shows more)"
    except Exception:
        return ""


def _memory_of_gpu() -> int:
    """Bytes that this process can have: what it has, and what is free or, under a cap of its own, left of that."""
    free, total = torch.cuda.mem_get_info()
    cap = round(total * torch.cuda.get_per_process_memory_fraction())
    return min(free + torch.cuda.memory_reserved(), cap)
