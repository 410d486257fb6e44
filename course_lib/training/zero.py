"""Training under DeepSpeed's ZeRO (Rajbhandari et al. 2020): optimizer states (1), gradients (2) and weights (3) in shares.

DeepSpeed hooks into autograd, so the model's own layers compute. It averages over processes where this library sums over
trained tokens: losses are multiplied by the number of processes to begin with.
"""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from course_lib.errors import InputError, did_you_mean, install_extra
from course_lib.files import read_json
from course_lib.training.distributed import process_count
from course_lib.training.parts import part_of

if TYPE_CHECKING:
    from course_lib.recipe import Recipe
    from course_lib.training.plain import PlainEngine

FOLDER = "deepspeed"  # in a checkpoint
ON_HOST = {"device": "cpu", "pin_memory": True}
STAGES: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero2_offload": {"stage": 2, "offload_optimizer": ON_HOST},
    "zero3_offload": {"stage": 3, "offload_optimizer": ON_HOST, "offload_param": ON_HOST},
}


def zero_settings(name_or_file: str, recipe: Recipe) -> dict[str, Any]:
    """DeepSpeed's settings: one of STAGES, or a JSON file of theirs; what the recipe says itself goes over what stands there.

    Raises:
        InputError: neither, or the recipe cannot be trained so.
    """
    if name_or_file in STAGES:
        settings: dict[str, Any] = {"zero_optimization": dict(STAGES[name_or_file])}
    elif Path(name_or_file).suffix == ".json":
        settings = read_json(name_or_file)
    else:
        raise InputError(
            f"--deepspeed {name_or_file}: name one of {', '.join(STAGES)}, or a .json file{did_you_mean(name_or_file, STAGES)}"
        )
    if not isinstance(settings.get("zero_optimization"), dict):
        raise InputError(f"--deepspeed {name_or_file}: has no section zero_optimization")
    zero = settings["zero_optimization"]
    if zero.get("stage") == 3 and recipe.model.dtype in ("nf4", "int8"):
        raise InputError(
            f"--deepspeed {name_or_file}: stage 3 would tear the quantised weights of model.dtype={recipe.model.dtype} from their "
            "scales; --fsdp spreads them over the GPUs, zero2 leaves them whole"
        )
    if recipe.training.offload:
        raise InputError(
            f"--deepspeed {name_or_file}: training.offload = {recipe.training.offload} is for the fused layers, which DeepSpeed does "
            "not run; use zero2_offload or zero3_offload, or leave --deepspeed out"
        )
    if "offload_optimizer" in zero and recipe.training.optimizer != "adamw":
        raise InputError(
            f"--deepspeed {name_or_file}: steps on the CPU, where training.optimizer={recipe.training.optimizer} cannot; set "
            "training.optimizer=adamw"
        )
    return settings


class ZeroUpdate:
    """What update.Update is, with the states in shares. `optimizer` is the one whose learning rates the schedule sets."""

    def __init__(
        self, engine: PlainEngine, optimizer: Any, settings: dict[str, Any], *, dtype: torch.dtype, max_grad_norm: float
    ) -> None:
        deepspeed = _deepspeed()
        self.stage = int(settings["zero_optimization"].get("stage", 0))
        self.kind = f"zero{self.stage} on {process_count()}"
        self.optimizer = optimizer
        settings = {key: value for key, value in settings.items() if key not in ("optimizer", "scheduler")} | {
            "train_micro_batch_size_per_gpu": 1,  # it counts nothing here: the loop weighs every token itself
            "gradient_accumulation_steps": 1,
            "gradient_clipping": max_grad_norm,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        self.deepspeed, *_ = deepspeed.initialize(
            model=engine.model, optimizer=optimizer, model_parameters=engine.trainable, config=settings
        )
        self.trainable = engine.trainable
        engine.model = self.deepspeed

    def autocast(self) -> AbstractContextManager[None]:
        """Nothing: DeepSpeed holds the weights in the type they compute in, and its optimizer the trained ones in float32."""
        return nullcontext()

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradients of one micro-batch; `last` is the last one of the step."""
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss * process_count())

    @part_of("optimizer")
    def step(self) -> torch.Tensor:
        """Take the step; the norm of the whole gradient before clipping, a scalar."""
        self.deepspeed.step()
        return torch.as_tensor(self.deepspeed.get_global_grad_norm(), dtype=torch.float32)

    def whole_weights(self) -> AbstractContextManager[None]:
        """While this is entered, by all processes, the trained weights are whole in each."""
        if self.stage < 3:
            return nullcontext()
        return _deepspeed().zero.GatheredParameters(self.trainable)

    def state(self, folder: Path) -> dict[str, Any]:
        """Written by DeepSpeed into the checkpoint's folder, each process its share."""
        self.deepspeed.save_checkpoint(str(folder / FOLDER), tag="shares", exclude_frozen_parameters=True)
        return {"optimizer": None, "scaler": None}

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Put back what `state` wrote, weights included."""
        self.deepspeed.load_checkpoint(str(folder / FOLDER), tag="shares", load_module_strict=False)


def _deepspeed() -> Any:
    try:
        import deepspeed
    except ImportError:
        raise InputError(f"--deepspeed: DeepSpeed is not installed; {install_extra('deepspeed')}") from None
    for handler in logging.getLogger("DeepSpeed").handlers:  # it logs where results go
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    return deepspeed
