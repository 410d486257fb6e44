"""One process a GPU: started on this machine by `--gpus N`, by torchrun, or by SLURM's srun.

Whoever starts them says in the environment which of how many a process is (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT); training/distributed.py reads no more than that. Nothing here loads torch but `launch`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import sys
import uuid
from collections.abc import MutableMapping, Sequence

from course_lib.errors import InputError

SECONDS_TO_SAVE = 120  # from Ctrl-C to the end of every process: a step and a checkpoint


def is_main_process() -> bool:
    """Whether this is the process that writes and speaks: the first, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def is_started() -> bool:
    """Whether something has started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def adopt_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Say in torchrun's variables what srun says in its own, where srun started several processes.

    A plain command inside an allocation is no step of several tasks, and is left alone.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks < 2 or "RANK" in environment:
        return
    environment["RANK"], environment["WORLD_SIZE"] = environment["SLURM_PROCID"], str(tasks)
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment.setdefault("MASTER_ADDR", _first_host(environment["SLURM_STEP_NODELIST"]))
    environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 10000))


def _first_host(hosts: str) -> str:
    """The first of SLURM's list of hosts, such as node[07-09,12],gpu3."""
    first = re.match(r"([^,\[]+)(?:\[([^\]]+)\])?", hosts)
    assert first is not None
    return first[1] + (re.split("[,-]", first[2])[0] if first[2] else "")


def launch(arguments: Sequence[str], *, gpus: int) -> int:
    """Run `course ARGUMENTS` in `gpus` processes of this machine by torchrun's launcher, and return their exit status.

    When one fails the others are ended. Ctrl-C and SIGTERM are passed on, and what they save is waited for.

    Raises:
        InputError: this machine has fewer GPUs.
    """
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    present = torch.cuda.device_count()
    if gpus > present:
        raise InputError(f"--gpus {gpus}: this machine has {present} GPU{'s' * (present != 1)}")
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # each process says itself what went wrong
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # NCCL warns of every process that ends early
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // gpus)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=gpus,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
    )
    if any(field.name == "shutdown_timeout" for field in dataclasses.fields(config)):  # new in PyTorch 2.13
        config.shutdown_timeout = SECONDS_TO_SAVE
    try:
        elastic_launch(config, sys.executable)("-m", "course_lib.cli", *arguments)
    except ChildFailedError as error:
        return _status([failure.exitcode for failure in error.failures.values()])
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _status(codes: Sequence[int]) -> int:
    """One exit status for several: what the person did (wrong input, Ctrl-C) goes before what followed from it."""
    return next((status for status in (2, 130) if status in codes), 1)
