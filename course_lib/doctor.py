"""What this machine has, what works, and how to mend the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Check:
    """One finding: `ok`, `absent` (something optional), or `fault` (the course will not work until it is mended)."""

    name: str
    state: Literal["ok", "absent", "fault"]
    finding: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        """The check as plain data."""
        return asdict(self)


# package -> supported versions (from, below), as in pyproject.toml
_SUPPORTED = {
    "torch": ("2.11", "2.15"),
    "transformers": ("5.17", "5.24"),
    "peft": ("0.21", "0.22"),
    "accelerate": ("1.15", "2"),
    "bitsandbytes": ("0.50", "0.51"),
}
_NEEDED_DISK = 2e9  # bytes: the embedded model twice, and a run
_NEEDED_MEMORY = 4e9


def examine() -> list[Check]:
    """Run every check; one that breaks is reported as a fault, not raised."""
    parts: list[Callable[[], list[Check]]] = [
        _python,
        _packages,
        _processor,
        _memory,
        _gpu,
        _disk,
        _embedded_model,
        _quantisation,
        _notebooks,
        _agent,
        _optional,
    ]
    checks: list[Check] = []
    for part in parts:
        try:
            checks += part()
        except Exception as error:
            checks.append(
                Check(part.__name__.strip("_"), "fault", f"the check itself failed: {type(error).__name__}: {error}")
            )
    return checks


def _python() -> list[Check]:
    version = platform.python_version()
    good = sys.version_info >= (3, 11)
    return [
        Check(
            "Python",
            "ok" if good else "fault",
            f"{version} on {platform.system()} {platform.machine()}",
            "" if good else "install Python 3.11 or newer",
        )
    ]


def _packages() -> list[Check]:
    from packaging.version import Version

    checks = []
    for package, (lowest, below) in _SUPPORTED.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(package, "fault", "not installed", "pip install -c constraints.txt -e ."))
            continue
        good = Version(lowest) <= Version(version) < Version(below)
        remedy = "" if good else f"supported: {lowest} up to {below}; pip install -c constraints.txt -e ."
        checks.append(Check(package, "ok" if good else "fault", version, remedy))
    return checks


def _processor() -> list[Check]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    remedy = "more threads than cores: set OMP_NUM_THREADS to the number of cores" if threads > cores else ""
    return [
        Check(
            "processor",
            "ok",
            f"{cores} cores, torch uses {threads} threads, {torch.backends.cpu.get_cpu_capability()}",
            remedy,
        )
    ]


def _memory() -> list[Check]:
    import psutil

    memory = psutil.virtual_memory()
    good = memory.available >= _NEEDED_MEMORY
    remedy = (
        "" if good else f"training the embedded model takes about {_NEEDED_MEMORY / 1e9:.0f} GB: close other programs"
    )
    return [
        Check(
            "memory",
            "ok" if good else "fault",
            f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f} GB",
            remedy,
        )
    ]


def _gpu() -> list[Check]:
    import torch

    if not torch.cuda.is_available():
        return [
            Check(
                "GPU",
                "absent",
                "none: scale cpu, with the embedded 135M model",
                "for 7B models, an NVIDIA GPU with 10 GB or more",
            )
        ]
    checks = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        checks.append(
            Check(
                f"GPU {index}",
                "ok",
                f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {precision}, CUDA {torch.version.cuda}",
            )
        )
    return checks


def _disk() -> list[Check]:
    from course_lib.models import cache_folder

    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    writable = os.access(folder, os.W_OK)
    good = free >= _NEEDED_DISK and writable
    finding = f"{free / 1e9:.0f} GB free, models are kept in {_short(folder)}" + (
        "" if writable else ", which cannot be written"
    )
    return [
        Check("disk", "ok" if good else "fault", finding, "" if good else "set COURSE_HOME to a folder with 2 GB free")
    ]


def _embedded_model() -> list[Check]:
    from course_lib.models import is_cached
    from course_lib.scale import DEFAULT_MODEL

    name = DEFAULT_MODEL["cpu"]
    if is_cached(name):
        return [Check("embedded model", "ok", f"{name} is here; everything at scale cpu works offline")]
    return [
        Check("embedded model", "absent", f"{name} is not fetched yet (93 MB, once)", f"course models fetch {name}")
    ]


def _quantisation() -> list[Check]:
    import torch
    from bitsandbytes import functional

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
    packed, state = functional.quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    error = (functional.dequantize_4bit(packed, state) - weights).abs().max().item()
    good = error < 0.2  # half the widest gap between NF4's sixteen levels is about 0.15
    return [
        Check(
            "4-bit weights",
            "ok" if good else "fault",
            f"NF4 works on {device}",
            "" if good else "reinstall bitsandbytes: pip install -c constraints.txt -e .",
        )
    ]


def _notebooks() -> list[Check]:
    try:
        version = importlib.metadata.version("jupyterlab")
    except importlib.metadata.PackageNotFoundError:
        return [Check("JupyterLab", "absent", "not installed", "make lab")]
    return [Check("JupyterLab", "ok", version)]


def _agent() -> list[Check]:
    from course_lib.agent.isolation import isolation_in_force
    from course_lib.agent.lock_down import SYSTEM_CALLS

    layers = isolation_in_force()
    good = SYSTEM_CALLS in layers
    return [
        Check(
            "agent's Python",
            "ok" if good else "absent",
            f"code that a model writes is held by {', '.join(layers) or 'nothing'}",
            "" if good else f"the tool python is off: it needs Linux with {SYSTEM_CALLS}; the other tools work",
        )
    ]


def _optional() -> list[Check]:
    gains = {
        "flash-attn": "faster attention on a GPU",
        "deepspeed": "ZeRO over several GPUs",
        "modelscope": "models from ModelScope",
        "mcp": "tools of MCP servers for an agent",
    }
    checks = []
    for package, gain in gains.items():
        try:
            checks.append(Check(package, "ok", importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(package, "absent", f"optional: {gain}"))
    return checks


def _short(folder: Path) -> str:
    """The folder with `~` for the user's home: a report is often pasted where others read it."""
    return f"~/{folder.relative_to(Path.home())}" if folder.is_relative_to(Path.home()) else str(folder)
