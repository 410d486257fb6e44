"""The folder a run writes to: what an earlier run left there, and where a resumed one begins.

`checkpoint-*` and `metrics.jsonl` appear while a run goes on, `adapter/` or `model/` at its end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from course_lib.errors import InputError
from course_lib.files import save_errors
from course_lib.training.checkpoint import checkpoints
from course_lib.training.listeners import METRICS_FILE, read_metrics

OUTPUTS = ("adapter", "model")


def checkpoint_to_resume(work_dir: Path, *, resume: bool, overwrite: bool) -> Path | None:
    """Return the checkpoint to go on from; None to begin with the first step.

    A run that was stopped before its first checkpoint has nothing to lose: resumed, it begins anew.

    Raises:
        InputError: an earlier run stands there and neither `resume` nor `overwrite` is asked for; or `resume` is, and there is
            none, or only its result.
    """
    with save_errors(work_dir):  # a name that is too long, or a folder that cannot be read
        done = checkpoints(work_dir)
        output = next((work_dir / name for name in OUTPUTS if (work_dir / name).exists()), None)
        earlier = bool(done or output or (work_dir / METRICS_FILE).exists())
    if resume and not earlier:
        raise InputError(f"{work_dir}: holds no run to resume; check --work-dir, or leave --resume out")
    if resume and output and not done:
        raise InputError(f"{output}: has no checkpoint beside it to go on from; name another --work-dir")
    if earlier and not (resume or overwrite):
        raise InputError(f"{work_dir}: already holds a run; add --resume to go on with it, or name another --work-dir")
    return done[-1][1] if resume and done else None


def events_until(work_dir: Path, step: int) -> list[dict[str, Any]]:
    """Events of a run up to where the checkpoint of `step` was saved: those a resumed run does not repeat."""
    kept = []
    for event in read_metrics(work_dir):
        if event.get("step", 0) > step:
            break
        kept.append(event)
        if event["event"] == "CheckpointSaved" and event["step"] == step:
            break
    return kept
