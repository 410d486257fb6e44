"""Several processes train one model, each on a GPU and with micro-batches of its own.

Every process has the same adapters and takes the same steps: the gradients of all are summed before each, so that a recipe
means the same on any number of GPUs. The first process alone writes and speaks. In a single process all of this does nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from course_lib.errors import CourseError
from course_lib.files import atomic_folder
from course_lib.training.launch import is_main_process, is_started

TIMEOUT = timedelta(hours=2)  # one process may save, or fetch a model, while the others wait
ALONE = "COURSE_GROUP_OF_ONE"  # in the environment: the other variables are ours
BUCKET = 2**26  # elements: gradients are summed in pieces of this size, not tensor by tensor

Value = TypeVar("Value")


class OtherProcessEnded(CourseError):
    """Another process of the training is gone; it has said itself why."""


def join(*, alone: bool = False) -> torch.device:
    """Join the processes this one was started with, and return its device. A second call finds them joined.

    Args:
        alone: make a group of one where nothing has started several, for what cannot do without a group.
    """
    has_gpu = torch.cuda.is_available()
    if alone and not is_started():
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT=_free_port())
        os.environ[ALONE] = "1"
    if not is_started() or (os.environ["WORLD_SIZE"] == "1" and not alone):
        return torch.device("cuda" if has_gpu else "cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # what is counted on the CPU is summed there, and no GPU is waited for
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout=TIMEOUT)
    return device


def leave() -> None:
    """Wait for the others and part; for the end of a run."""
    if dist.is_initialized():
        sum_over_processes([0])
        dist.destroy_process_group()


def leave_alone() -> None:
    """Undo what `join` did for a process that nothing had started as one of several, however its run ended.

    Later runs of this process, and programs it starts, must not take themselves for one of a group.
    """
    if os.environ.pop(ALONE, None) is None:
        return
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def process_count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_index() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_processes(values: Sequence[int]) -> list[int]:
    """Sum each value over all processes; on the CPU, so that no GPU is waited for.

    Raises:
        OtherProcessEnded: a process is gone.
    """
    if process_count() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.int64)
    with _told_of_others():
        dist.all_reduce(total)
    return total.tolist()


def any_process(asked: Callable[[], bool]) -> bool:
    """Whether one of the processes says yes."""
    return sum_over_processes([int(asked())]) != [0]


def from_main(make: Callable[[], Value]) -> Value:
    """What the first process makes, for all of them: they must not find different things on the disk."""
    if process_count() == 1:
        return make()
    box = [make() if is_main_process() else None]
    with _told_of_others():
        dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def gather(value: Value) -> list[Value]:
    """The value of every process, in their order."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    with _told_of_others():
        dist.all_gather_object(values, value)
    return values


@contextmanager
def main_first() -> Iterator[None]:
    """The first process of each machine does it before the others, who then find it done, such as a cache that is filled."""
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if not first:
        sum_over_processes([0])
    yield
    if first:
        sum_over_processes([0])


@contextmanager
def shared_folder(path: Path) -> Iterator[Path]:
    """`atomic_folder`, into which every process may write: it takes its place when all are done."""
    if process_count() == 1:
        with atomic_folder(path) as folder:
            yield folder
    elif is_main_process():
        with atomic_folder(path) as folder:
            from_main(lambda: folder)
            yield folder
            sum_over_processes([0])
    else:
        yield from_main(lambda: path)
        sum_over_processes([0])


@torch.no_grad()
def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Make every gradient the sum of all processes'. One that a process has not made counts as zero."""
    if process_count() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in parameters]):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            sum_tensor(bucket[0])
            continue
        flat = sum_tensor(torch.cat([gradient.flatten() for gradient in bucket]))
        for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def sum_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes, in place, on its device."""
    if process_count() > 1:
        with _told_of_others():
            dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def same_everywhere(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Give every process the first one's values."""
    if process_count() > 1:
        for parameter in parameters:
            dist.broadcast(parameter.data, src=0)


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours of one type together, up to BUCKET elements."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        full = sum(other.numel() for other in bucket) + tensor.numel() > BUCKET
        if bucket and (full or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def _told_of_others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo says of a broken connection only what the socket said
        raise OtherProcessEnded("another process of this training has ended; its own message says why") from error


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])
