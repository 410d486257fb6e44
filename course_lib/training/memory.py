"""Peak memory of a run."""

from __future__ import annotations

import resource
import sys

import torch


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
