"""The model's own layers under autograd: what trains where the fused layers do not apply."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from course_lib.training.loss import supervised_loss

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class PlainEngine:
    """The model's own layers, run by autograd."""

    def __init__(self, model: PreTrainedModel, reason: str, *, checkpoint: bool | int = False) -> None:
        """`checkpoint` keeps of every layer, or of that many, its input alone and runs it again in backward."""
        self.description = f"the model's own layers ({reason})"
        self.model = model
        self.named_trainable = {
            name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        self.trainable = [*self.named_trainable.values()]
        if checkpoint:
            _checkpoint_layers(model, checkpoint)

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """`supervised_loss` of the model."""
        return supervised_loss(self.model, batch)

    def after_step(self) -> None:
        """Nothing: the layers compute with what the optimizer steps."""


def _checkpoint_layers(model: PreTrainedModel, checkpoint: bool | int) -> None:
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers[len(layers) if checkpoint is True else checkpoint :]:
        layer.gradient_checkpointing = False
