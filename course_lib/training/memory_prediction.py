"""How much memory a training takes, by part, from the recipe and the model's sizes alone: nothing is loaded.

For the fused layers every tensor is counted (step_memory.py); for the models' own layers activations are estimated
(plain_memory.py). The peak is the most there is at one moment, not the sum of all that ever is.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from course_lib.errors import InputError, did_you_mean
from course_lib.model_shape import ModelShape
from course_lib.recipe import Recipe
from course_lib.sizes import in_gb
from course_lib.training.fused_sizes import FAMILIES, NF4_BLOCK, NF4_GROUP, checkpointed_layers
from course_lib.training.memory_parts import (
    BYTES,
    computed_in,
    fused_groups,
    fused_lasting,
    has_dora,
    offloaded,
    optimizer_workspace,
    plain_lasting,
    tokens_a_batch,
)
from course_lib.training.plain_memory import plain_moments
from course_lib.training.step_memory import Step, step_memory

PARTS = ("weights", "embedding", "head", "adapters", "gradients", "optimizer", "activations", "workspace")
OUTSIDE_LAYERS = {"lm_head", "embed_tokens"}  # can have an adapter too
CONTEXT = NCCL = (
    500 * 10**6
)  # what CUDA, and the library by which several GPUs speak, take beside what PyTorch allocates
UNUSED_SHARE = 0.03  # of the peak: blocks that PyTorch has reserved and cannot use


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes on one GPU.

    Attributes:
        parts: what is there at the peak, in the order of `PARTS`; it sums to `peak`.
        moment: when the peak is.
        resident: what stays between two steps.
        host: what stays in host memory for the run, beside what is usual: offloaded parts, in the powers of two that pinned memory
            comes in, and paged optimizer states, which the GPU holds too while it has room.
        libraries: what CUDA, and with several GPUs NCCL, takes beside what PyTorch allocates.
        engine: fused, or plain for the model's own layers, for which activations are estimated; `reason` says why plain.
    """

    parts: dict[str, int]
    moment: str
    resident: int
    host: int
    libraries: int
    engine: str
    reason: str = ""

    @property
    def peak(self) -> int:
        """What `torch.cuda.max_memory_allocated` will say."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """Memory a card must have: the peak, the libraries', and blocks that PyTorch has reserved and cannot use."""
        return self.peak + self.libraries + round(UNUSED_SHARE * self.peak)

    @property
    def margin(self) -> str:
        """What `needed` has over the peak, in words."""
        return f"{in_gb(self.libraries, 1)} for CUDA's own, {UNUSED_SHARE:.0%} for blocks that PyTorch cannot use"

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON takes it."""
        return {**asdict(self), "peak": self.peak, "needed": self.needed}


def predict_memory(recipe: Recipe, shape: ModelShape, *, gpus: int = 1, shard: bool = False) -> MemoryPrediction:
    """Predict a run's memory on each of its GPUs, for packs that are full and trained on every token.

    Args:
        gpus: each has adapters, gradients and batches of its own.
        shard: each has its share of the frozen layers only (`course train --fsdp`); else it has them whole.

    Raises:
        InputError: an adapter's target is no linear layer of the model, or layers are to be shared that are not fused.
    """
    _check_targets(recipe, shape)
    reason = why_plain(recipe, shape)
    if reason and shard:
        raise InputError(f"--fsdp needs the fused layers, which do not apply ({reason}); leave it out")
    libraries = CONTEXT + (NCCL if gpus > 1 else 0)
    if reason:
        return _predict_plain(recipe, shape, gpus, libraries, reason)
    return _predict_fused(recipe, shape, gpus if shard else 1, libraries)


def why_plain(recipe: Recipe, shape: ModelShape) -> str:
    """Why the fused layers will not apply; empty where they will. Foretells `fused.why_not_fused`."""
    lora, dtype = recipe.lora, recipe.model.dtype
    if lora is None:
        return "full fine-tuning"
    if shape.model_type not in FAMILIES:
        return f"{shape.model_type} has layers of another shape"
    linears = [f".{linear.name}" for linear in shape.linears]
    for target in lora.targets if isinstance(lora.targets, list) else []:
        if not any(name.endswith(f".{target}") for name in linears):
            return f"{target} has an adapter"
    if computed_in(recipe) == "float16":
        return "float16 needs its gradients scaled"
    if has_dora(recipe):
        return "DoRA scales the rows of frozen weights"
    if dtype == "int8":
        return "a linear layer is a Linear8bitLt"
    if shape.window is not None and recipe.data.max_length > shape.window:
        return "rows are padded"
    block = NF4_BLOCK * (NF4_GROUP if recipe.model.double_quant else 1)
    for linear in shape.linears if dtype == "nf4" else ():
        if linear.inputs * linear.outputs % block:
            return (
                f"a linear layer has {linear.inputs * linear.outputs} weights, no whole number of quantisation blocks"
            )
    return ""


def _check_targets(recipe: Recipe, shape: ModelShape) -> None:
    names = {linear.name.rsplit(".", 1)[-1] for linear in shape.linears}
    for target in recipe.lora.targets if recipe.lora and isinstance(recipe.lora.targets, list) else []:
        if target.rsplit(".", 1)[-1] not in names | OUTSIDE_LAYERS:
            raise InputError(
                f"lora.targets: {target!r} is no linear layer of {shape.model_type} (it has {', '.join(sorted(names))})"
                f"{did_you_mean(target, names)}"
            )


def _predict_fused(recipe: Recipe, shape: ModelShape, shares: int, libraries: int) -> MemoryPrediction:
    assert recipe.lora is not None
    lasting, tokens = fused_lasting(recipe, shape, shares=shares), tokens_a_batch(recipe)
    step = Step(
        shape=shape,
        groups=tuple(fused_groups(shape, recipe.lora)),
        tokens=tokens,
        trained=tokens,
        samples=recipe.training.batch_size,
        element=BYTES[computed_in(recipe)],
        checkpointed=checkpointed_layers(recipe.training.gradient_checkpointing, shape.layers),
        offload=offloaded(recipe, shape) & {"head", "checkpoints"},
        loss_chunk=recipe.training.loss_chunk,
        flash=computed_in(recipe) != "float32",
    )
    ledger, of_optimizer = step_memory(step), optimizer_workspace(recipe, shape)
    if of_optimizer > ledger.peak:
        moment, passing = "optimizer step", Counter(workspace=of_optimizer)
    else:
        moment = max(ledger.moments, key=lambda name: ledger.moments[name])
        workspace = ledger.workspace_at_peak
        passing = Counter(activations=ledger.peak - workspace, workspace=workspace)
    parts = lasting.parts + passing
    return MemoryPrediction(
        parts={name: parts[name] for name in PARTS},
        moment=moment,
        resident=lasting.parts.total(),
        host=lasting.host,
        libraries=libraries,
        engine="fused",
    )


def _predict_plain(recipe: Recipe, shape: ModelShape, gpus: int, libraries: int, reason: str) -> MemoryPrediction:
    lasting = plain_lasting(recipe, shape)
    gradients = lasting.parts.pop("gradients")
    most = max(
        plain_moments(recipe, shape, gpus=gpus), key=lambda at: at.activations + at.workspace + at.gradients * gradients
    )
    parts = lasting.parts + Counter(
        activations=most.activations, workspace=most.workspace, gradients=round(most.gradients * gradients)
    )
    return MemoryPrediction(
        parts={name: parts[name] for name in PARTS},
        moment=most.name,
        resident=lasting.parts.total(),
        host=lasting.host,
        libraries=libraries,
        engine="plain",
        reason=reason,
    )
