"""The one dial: `COURSE_SCALE` decides how large everything is.

| scale | model | for |
|---|---|---|
| tiny | a random 2-layer model, made in a second | tests |
| cpu | SmolLM2-135M-Instruct, embedded | a laptop: a minute or two of training a notebook |
| gpu | a 7B model, QLoRA | one GPU |
"""

from __future__ import annotations

import os
from typing import Literal, get_args

from course_lib.errors import InputError, did_you_mean

Scale = Literal["tiny", "cpu", "gpu"]

DEFAULT_MODEL: dict[str, str] = {
    "tiny": "tiny",
    "cpu": "smollm2-135m-instruct",
    "gpu": "qwen2.5-7b-instruct",
}


def current_scale(scale: str | None = None) -> Scale:
    """Return the scale asked for, else `COURSE_SCALE`, else what the machine has.

    Raises:
        InputError: the name is none of tiny, cpu, gpu.
    """
    asked = scale or os.environ.get("COURSE_SCALE", "")
    if asked:
        if asked not in get_args(Scale):
            raise InputError(
                f"scale {asked!r} is unknown: choose tiny, cpu or gpu{did_you_mean(asked, get_args(Scale))}"
            )
        return asked  # type: ignore[return-value]
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"
