"""Checkpoints a run can go on from: weights, optimizer, schedule, random generators, and the step.

The order of the data follows from the recipe's seed and the step, so the step is the data cursor.
A checkpoint is written under a temporary name and renamed when whole (files.py); older ones go only after that.
"""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any, NoReturn

import torch

from course_lib.errors import CourseError, InputError
from course_lib.files import atomic_file

_NAME = re.compile(r"checkpoint-(\d{6})")
STATE_FILE = "trainer_state.pt"
# a resumed run must be the same run: these parts of the recipe must not have changed
FIXED_SECTIONS = ("model", "lora", "data", "training")


def checkpoints(work_dir: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a run as (step, folder), oldest first."""
    found = ((_NAME.fullmatch(path.name), path) for path in work_dir.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in found if match and (path / STATE_FILE).is_file())


def checkpoint_folder(work_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` stands, or will."""
    return work_dir / f"checkpoint-{step:06d}"


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the state into a checkpoint's folder; the last thing that is written there makes it complete."""
    torch.save(state, folder / STATE_FILE)


def keep_newest(work_dir: Path, count: int) -> None:
    """Remove all checkpoints but the `count` newest."""
    for _, old in checkpoints(work_dir)[:-count]:
        shutil.rmtree(old)


def remove_checkpoints(work_dir: Path) -> None:
    """Remove an earlier run's checkpoints; its adapter stays until a new one replaces it."""
    for _, folder in checkpoints(work_dir):
        shutil.rmtree(folder)


def save_bad_batch(work_dir: Path, *, step: int, batch: dict[str, Any], loss: float) -> NoReturn:
    """Save the batch whose loss is not a number, and end the run.

    Raises:
        CourseError: always; it names the file.
    """
    path = work_dir / "bad_batch.pt"
    with atomic_file(path) as temporary:
        torch.save({"step": step, "batch": batch}, temporary)
    raise CourseError(
        f"step {step}: the loss is {loss}; the batch is saved in {path}; lower training.lr, or use bfloat16 instead of float16"
    )


def load_state(folder: Path, *, recipe: dict[str, Any], mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint's state; `weights_only` keeps a hostile file from running code. `mapped` leaves tensors in the file.

    Raises:
        InputError: the run was made from another recipe; the first key that differs is named.
        CourseError: the file is damaged.
    """
    try:
        state = torch.load(folder / STATE_FILE, weights_only=True, map_location="cpu", mmap=mapped)
    except Exception as error:
        raise CourseError(
            f"{folder / STATE_FILE}: damaged ({' '.join(str(error).split())[:120]}); remove this checkpoint to resume from the one before"
        ) from error
    for section in FIXED_SECTIONS:
        before, now = state["recipe"][section], recipe[section]
        if before != now:
            key = next((key for key in now if before.get(key) != now[key]), "") if before and now else ""
            detail = f".{key} was {before[key]!r} and is {now[key]!r}" if key else " differs"
            raise InputError(
                f"{folder}: made from another recipe: {section}{detail}; resume with the same recipe, or start anew with another --work-dir"
            )
    return state


def random_state() -> dict[str, Any]:
    """States of the random generators a run draws from."""
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back to where `random_state` found them."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
