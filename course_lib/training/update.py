"""From gradients to an optimizer step: backward, summing over processes, clipping, stepping."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from course_lib.training.distributed import sum_gradients
from course_lib.training.fused import FusedEngine
from course_lib.training.parts import part_of

if TYPE_CHECKING:
    from accelerate import Accelerator

    from course_lib.training.plain import PlainEngine


class Update:
    """Every process holds all gradients and optimizer states, and takes the same step.

    Attributes:
        kind: what a checkpoint says of how it was made; only the same can go on from it.
        optimizer: whose learning rates the schedule sets.
    """

    kind = "whole"

    def __init__(
        self, accelerator: Accelerator, engine: FusedEngine | PlainEngine, optimizer: Any, *, max_grad_norm: float
    ) -> None:
        self.accelerator, self.engine, self.max_grad_norm = accelerator, engine, max_grad_norm
        self.optimizer = accelerator.prepare(optimizer)

    def autocast(self) -> AbstractContextManager[None]:
        """The type that forward computes in."""
        return self.accelerator.autocast()

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradients of one micro-batch; `last` is the last one of the step."""
        self.accelerator.backward(loss)

    @part_of("optimizer")
    def step(self) -> torch.Tensor:
        """Take the step; the norm of the whole gradient before clipping, a scalar on the device."""
        sum_gradients(self.engine.trainable)
        norm = self.accelerator.clip_grad_norm_(self.engine.trainable, self.max_grad_norm)
        self.optimizer.step()
        self.engine.after_step()
        self.optimizer.zero_grad(
            set_to_none=not isinstance(self.engine, FusedEngine)
        )  # flat gradients keep their place
        return norm

    def whole_weights(self) -> AbstractContextManager[None]:
        """While this is entered, by all processes, the trained weights are whole in each."""
        return nullcontext()

    def state(self, folder: Path) -> dict[str, Any]:
        """What `restore` needs; all processes call it, and what they share is written into the checkpoint's folder."""
        scaler = self.accelerator.scaler
        return {"optimizer": self.optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None}

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Put back what `state` returned. The model's weights are those of the checkpoint already."""
        self.engine.after_step()
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
