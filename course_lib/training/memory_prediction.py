"""How much memory a training takes, by part, from the recipe and the model's sizes alone: nothing is loaded.

For the fused layers every tensor is counted (step_memory.py); for the models' own layers activations are estimated
(plain_memory.py). The peak is the most there is at one moment, not the sum of all that ever is.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from course_lib.model_shape import LinearShape, ModelShape
from course_lib.recipe import LoraSettings, Recipe
from course_lib.training.fused_sizes import (
    ALIGNMENT,
    ALIGNMENT_ON_HOST,
    FAMILIES,
    GROUPS,
    NF4_BLOCK,
    NF4_GROUP,
)
from course_lib.training.step_memory import Group, Ledger, Step, replay_step

PARTS = ("weights", "embedding", "head", "adapters", "gradients", "optimizer", "activations", "workspace")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MATRIX_WORKSPACE = 2 * 32 * 2**20  # cuBLAS's on a Hopper, one for each thread that computes: forward's and backward's
CONTEXT = 500 * 10**6  # what CUDA and its libraries take beside what PyTorch allocates
UNUSED_SHARE = 0.03  # of the peak: blocks that PyTorch has reserved and cannot use
LEAST_8BIT, LEAST_PAGED = 4096, 100_000  # elements: smaller tensors have states in 32 bits, or not paged (bitsandbytes)


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes on one GPU.

    Attributes:
        parts: what is there at the peak, in the order of `PARTS`; it sums to `peak`.
        peak: what `torch.cuda.max_memory_allocated` will say.
        moment: when that is.
        resident: what stays between two steps.
        host: what stays in host memory for the run: offloaded parts, in the powers of two that pinned memory comes in, and
            paged optimizer states.
        engine: fused, or plain for the model's own layers, for which activations are estimated; `reason` says why plain.
    """

    parts: dict[str, int]
    moment: str
    resident: int
    host: int
    engine: str
    reason: str = ""

    @property
    def peak(self) -> int:
        """Sum of the parts."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """Memory a card must have: the peak, CUDA's own, and blocks that are reserved and cannot be used."""
        return self.peak + CONTEXT + round(UNUSED_SHARE * self.peak)


def predict_memory(recipe: Recipe, shape: ModelShape, *, gpus: int = 1) -> MemoryPrediction:
    """Predict a run's memory on each of its GPUs, for packs that are full and wholly trained."""
    reason = why_plain(recipe, shape)
    if reason:
        raise NotImplementedError
    return _predict_fused(recipe, shape)


def why_plain(recipe: Recipe, shape: ModelShape) -> str:
    """Why the fused layers do not apply; empty where they do. Foretells `fused.why_not_fused`."""
    lora, dtype = recipe.lora, recipe.model.dtype
    if lora is None:
        return "full fine-tuning"
    if shape.model_type not in FAMILIES:
        return f"{shape.model_type} has layers of another shape"
    if "float16" in (dtype, computed_in(recipe)):
        return "float16 needs its gradients scaled"
    if dtype == "int8":
        return "a linear layer is a Linear8bitLt"
    if shape.window is not None and recipe.data.max_length > shape.window:
        return "rows are padded"
    block = NF4_BLOCK * (NF4_GROUP if recipe.model.double_quant else 1)
    for linear in shape.linears if dtype == "nf4" else ():
        if linear.inputs * linear.outputs % block:
            return f"a linear layer has {linear.inputs * linear.outputs} weights, no whole number of quantisation blocks"
    return ""


def computed_in(recipe: Recipe) -> str:
    """The number format of the products, on a GPU."""
    settings = recipe.model
    if settings.dtype in ("nf4", "int8"):
        return "bfloat16" if settings.compute_dtype == "auto" else settings.compute_dtype
    return "bfloat16" if settings.dtype == "auto" else settings.dtype


def adapted(shape: ModelShape, lora: LoraSettings) -> list[LinearShape]:
    """Linear layers of a decoder layer that get an adapter."""
    if lora.targets == "all-linear":
        return list(shape.linears)
    return [linear for linear in shape.linears if any(f".{linear.name}".endswith(f".{t}") for t in lora.targets)]


def fused_groups(shape: ModelShape, lora: LoraSettings) -> list[Group]:
    """The linear layers of a decoder layer in the groups that the fused layers compute together."""
    by_name = {linear.name: linear for linear in shape.linears}
    with_adapter = {linear.name for linear in adapted(shape, lora)}
    groups = []
    for part, names, joined in GROUPS:
        linears = [by_name[f"{part}.{name}"] for name in names]
        ranks = tuple(lora.r for linear in linears if linear.name in with_adapter)
        fits = not lora.dropout and len(ranks) == len(linears) and linears[0].inputs % ALIGNMENT == 0
        groups.append(
            Group(
                inputs=linears[0].inputs,
                outputs=sum(linear.outputs for linear in linears),
                ranks=ranks,
                joined=joined if fits else None,
                dropout=bool(lora.dropout),
            )
        )
    return groups


def _predict_fused(recipe: Recipe, shape: ModelShape) -> MemoryPrediction:
    assert recipe.lora is not None
    training, offload = recipe.training, {*recipe.training.offload}
    if shape.tied and offload & {"embedding", "head"}:
        offload |= {"embedding", "head"}
    element = BYTES[computed_in(recipe)]
    groups = fused_groups(shape, recipe.lora)
    tensors = [size for group in groups for size in _frozen_tensors(group, recipe, element)]
    parts = dict.fromkeys(PARTS, 0)
    layer, table = sum(map(allocated, tensors)), allocated(shape.table * element)
    host = 0
    if "layers" in offload:
        place = sum(ceil(size / ALIGNMENT_ON_HOST) * ALIGNMENT_ON_HOST for size in tensors)
        parts["workspace"] += 2 * allocated(place)
        host += shape.layers * pinned(place)
    else:
        parts["weights"] += shape.layers * layer
    parts["weights"] += _small_weights(shape, groups, element)
    if "embedding" in offload:
        host += shape.table * element
    else:
        parts["embedding"] = table
    if "head" in offload:
        host += pinned(shape.table * element)
    elif not shape.tied:
        parts["head"] = table
    tokens = training.batch_size * recipe.data.max_length
    if "checkpoints" in offload:
        place = tokens * shape.width * element
        parts["workspace"] += 2 * allocated(place)
        host += (shape.layers - 1) * pinned(place)
    if recipe.model.dtype == "nf4":
        parts["workspace"] += allocated(max(group.whole for group in groups) * element)
    parts["workspace"] += MATRIX_WORKSPACE
    linears = adapted(shape, recipe.lora)
    flat = [
        shape.layers * recipe.lora.r * sum(linear.inputs for linear in linears),
        shape.layers * recipe.lora.r * sum(linear.outputs for linear in linears),
    ]
    master = BYTES[recipe.lora.dtype]
    for size in flat:
        parts["adapters"] += allocated(size * master) + (allocated(size * element) if master != element else 0)
        parts["gradients"] += allocated(size * master)
        on_gpu, on_host = optimizer_states(size, training.optimizer, master)
        parts["optimizer"] += on_gpu
        host += on_host
    resident = sum(parts.values())
    ledger = Ledger()
    step = Step(
        shape=shape, groups=tuple(groups), tokens=tokens, trained=tokens, samples=training.batch_size, element=element,
        checkpoint=training.gradient_checkpointing, offload=offload,
    )  # fmt: skip
    replay_step(step, ledger)
    ledger.moment = "optimizer step"
    ledger.hold("square roots", optimizer_workspace(sum(flat), training.optimizer, master), workspace=True)
    parts["activations"] = ledger.at_peak["activations"]
    parts["workspace"] += ledger.at_peak["workspace"]
    moment = max(ledger.moments, key=lambda name: ledger.moments[name])
    return MemoryPrediction(parts=parts, moment=moment, resident=resident, host=host, engine="fused")


def _frozen_tensors(group: Group, recipe: Recipe, element: int) -> list[int]:
    """Bytes of each tensor that a stack of frozen weights is made from (frozen.FrozenLinears.tensors)."""
    weights = group.inputs * group.outputs
    if recipe.model.dtype != "nf4":
        return [group.whole * element]
    blocks = weights // NF4_BLOCK
    if not recipe.model.double_quant:
        return [weights // 2, blocks * 4]
    factors = blocks // NF4_GROUP * 4
    return [weights // 2, blocks, NF4_GROUP * 4, factors, factors]


def _small_weights(shape: ModelShape, groups: list[Group], element: int) -> int:
    """Norms, biases (the layers' own, and those of each stack), and which layer of a stack each row belongs to."""
    biases = sum(allocated(linear.outputs * element) for linear in shape.linears if linear.bias)
    stacked = sum(allocated(group.outputs * element) for group in groups) if biases else 0
    owners = sum(allocated(group.outputs * 4) for group in groups if group.joined == "forward")
    norms = 2 * allocated(shape.width * element) + 2 * allocated(shape.head_dim * element) * shape.head_norms
    return shape.layers * (biases + stacked + owners + norms) + allocated(shape.width * element)


def optimizer_states(size: int, optimizer: str, element: int) -> tuple[int, int]:
    """Bytes of AdamW's two states for a tensor of `size` elements: on the GPU, and paged."""
    if optimizer == "adamw":
        return 2 * allocated(size * element), 0
    eight = optimizer.endswith("8bit") and size >= LEAST_8BIT
    states = 2 * allocated(size * (1 if eight else 4))
    scales = 2 * allocated(ceil(size / 256) * 4) if eight else 0
    return (scales, states) if optimizer.startswith("paged") and size >= LEAST_PAGED else (states + scales, 0)


def optimizer_workspace(size: int, optimizer: str, element: int) -> int:
    """Bytes that a step makes: torch's AdamW takes the square root of all second moments at once."""
    return size * element if optimizer == "adamw" else 0


def allocated(size: int) -> int:
    """Bytes that PyTorch's allocator gives for a tensor."""
    return ceil(size / 512) * 512


def pinned(size: int) -> int:
    """Bytes of pinned host memory for a tensor: the next power of two."""
    return 1 << max(0, size - 1).bit_length()
