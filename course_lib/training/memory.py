"""Peak memory of a run, and what is said when there is too little."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from course_lib.errors import CourseError


def reset_peak_memory() -> None:
    """Start measuring anew; a process's resident peak cannot be reset."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes() -> int:
    """Peak bytes allocated on the GPU, or resident in memory without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in kilobytes


@contextmanager
def memory_errors() -> Iterator[None]:
    """Say in one line that memory ran out, and what takes less of it.

    Raises:
        CourseError: memory ran out on the GPU, or the system gave none.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has an error of its own for a GPU only
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise CourseError(
            "memory ran out: lower training.batch_size, data.max_length or lora.r, set training.gradient_checkpointing=true, "
            "or choose a smaller model.name or model.dtype=nf4"
        ) from error
