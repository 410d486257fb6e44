"""What of a training stays in memory from step to step: weights, adapters, gradients and optimizer, from the recipe and the model's sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from math import ceil

from course_lib.model_shape import LinearShape, ModelShape
from course_lib.recipe import LoraSettings, Recipe
from course_lib.training.fused_sizes import ALIGNMENT, ALIGNMENT_ON_HOST, GROUPS, NF4_BLOCK, NF4_GROUP
from course_lib.training.step_memory import Group

MIB = 2**20
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MATRIX_WORKSPACE = (
    2 * 32 * MIB
)  # cuBLAS's on a Hopper, for each thread that computes: that of forward and that of backward
LEAST_8BIT, LEAST_PAGED = 4096, 100_000  # elements: smaller tensors have states in 32 bits, or not paged (bitsandbytes)


@dataclass
class Lasting:
    """Bytes that are there between two steps: on the GPU by part, and in host memory."""

    parts: Counter[str] = field(default_factory=Counter)
    host: int = 0


def allocated(size: int) -> int:
    """Bytes that PyTorch's allocator gives for a lasting tensor.

    They are a multiple of 512. From 10 MiB on a tensor has a segment of its own, a multiple of 2 MiB, and what it leaves of that
    goes to others only if it is more than 1 MiB (c10/cuda/CUDACachingAllocator.cpp).
    """
    size = ceil(size / 512) * 512
    segment = ceil(size / (2 * MIB)) * 2 * MIB
    return segment if size >= 10 * MIB and segment - size <= MIB else size


def pinned(size: int) -> int:
    """Bytes of pinned host memory for a tensor: the next power of two (at/src/ATen/core/CachingHostAllocator.h)."""
    return 1 << max(0, size - 1).bit_length()


def computed_in(recipe: Recipe) -> str:
    """The number format of the products, on a GPU."""
    settings = recipe.model
    if settings.dtype in ("nf4", "int8"):
        return "bfloat16" if settings.compute_dtype == "auto" else settings.compute_dtype
    return "bfloat16" if settings.dtype == "auto" else settings.dtype


def with_adapter(shape: ModelShape, lora: LoraSettings) -> list[LinearShape]:
    """Linear layers of a decoder layer that get an adapter."""
    if lora.targets == "all-linear":
        return list(shape.linears)
    return [linear for linear in shape.linears if any(f".{linear.name}".endswith(f".{t}") for t in lora.targets)]


def has_dora(recipe: Recipe) -> bool:
    """Whether adapters have magnitudes (DoRA), which are trained beside them."""
    return recipe.lora is not None and recipe.lora.dora


def fused_groups(shape: ModelShape, lora: LoraSettings) -> list[Group]:
    """The linear layers of a decoder layer in the groups that the fused layers compute together."""
    by_name = {linear.name: linear for linear in shape.linears}
    adapted = {linear.name for linear in with_adapter(shape, lora)}
    groups = []
    for part, names, joined in GROUPS:
        linears = [by_name[f"{part}.{name}"] for name in names]
        ranks = tuple(lora.r for linear in linears if linear.name in adapted)
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


def fused_lasting(recipe: Recipe, shape: ModelShape, *, shares: int = 1) -> Lasting:
    """Of a run of the fused layers. Where `shares` is above 1, each GPU has that share of the frozen layers (shards.py)."""
    assert recipe.lora is not None
    lasting, offload, element = Lasting(), offloaded(recipe, shape), BYTES[computed_in(recipe)]
    groups = fused_groups(shape, recipe.lora)
    tensors = [size for group in groups for size in _frozen_tensors(group, recipe, element)]
    place = sum(ceil(size / ALIGNMENT_ON_HOST) * ALIGNMENT_ON_HOST for size in tensors)
    if "layers" in offload:
        lasting.parts["workspace"] += 2 * allocated(place)
        lasting.host += shape.layers * pinned(place)
    elif shares > 1:
        part = ceil(place / shares)
        lasting.parts["workspace"] += 2 * allocated(part * shares)
        lasting.parts["weights"] += shape.layers * allocated(part)
    else:
        lasting.parts["weights"] += shape.layers * sum(map(allocated, tensors))
    lasting.parts["weights"] += _small_tensors(shape, groups, element)
    _add_tables(lasting, shape, offload, element)
    if "checkpoints" in offload:
        inputs = tokens_a_batch(recipe) * shape.width * element
        lasting.parts["workspace"] += 2 * allocated(inputs)
        lasting.host += (shape.layers - 1) * pinned(inputs)
    if recipe.model.dtype == "nf4":  # where weights are dequantised
        lasting.parts["workspace"] += allocated(max(group.whole for group in groups) * element)
    lasting.parts["workspace"] += MATRIX_WORKSPACE
    master = BYTES[recipe.lora.dtype]
    for size in _adapter_sizes(recipe, shape):  # all A, and all B, are one tensor each
        shadow = allocated(size * element) if master != element else 0
        lasting.parts["adapters"] += allocated(size * master) + shadow
        lasting.parts["gradients"] += allocated(size * master)
        _add_optimizer(lasting, size, recipe.training.optimizer, master)
    return lasting


def plain_lasting(recipe: Recipe, shape: ModelShape) -> Lasting:
    """Of a run of the model's own layers; gradients are counted here, though they are gone between steps."""
    lasting, element = Lasting(), BYTES[computed_in(recipe)]
    bytes_a_weight = {"nf4": 0.5 + (4 if not recipe.model.double_quant else 1 + 4 / NF4_GROUP) / NF4_BLOCK, "int8": 1}
    for linear in shape.linears:
        weights = linear.inputs * linear.outputs
        size = ceil(weights * bytes_a_weight.get(recipe.model.dtype, element)) + linear.outputs * linear.bias * element
        lasting.parts["weights"] += shape.layers * allocated(size)
    lasting.parts["weights"] += (shape.layers * shape.layer_extras + shape.extras) * element
    _add_tables(lasting, shape, (), element)
    lasting.parts["workspace"] += MATRIX_WORKSPACE
    if recipe.lora is None:
        sizes, master = [shape.parameters], element
    else:
        sizes, master = _adapter_sizes(recipe, shape), BYTES[recipe.lora.dtype]
        lasting.parts["adapters"] += sum(sizes) * master
    for size in sizes:
        lasting.parts["gradients"] += size * master
        _add_optimizer(lasting, size, recipe.training.optimizer, master)
    return lasting


def offloaded(recipe: Recipe, shape: ModelShape) -> frozenset[str]:
    """What stays in host memory: an embedding and a head that are one go together."""
    parts = frozenset(recipe.training.offload)
    return parts | {"embedding", "head"} if shape.tied and parts & {"embedding", "head"} else parts


def tokens_a_batch(recipe: Recipe) -> int:
    """Tokens of a micro-batch whose packs are full."""
    return recipe.training.batch_size * recipe.data.max_length


def optimizer_workspace(recipe: Recipe, shape: ModelShape) -> int:
    """Bytes that a step of the optimizer makes: torch's AdamW takes the roots of all second moments at once."""
    if recipe.training.optimizer != "adamw":
        return 0
    if recipe.lora is None:
        return shape.parameters * BYTES[computed_in(recipe)]
    return sum(_adapter_sizes(recipe, shape)) * BYTES[recipe.lora.dtype]


def _adapter_sizes(recipe: Recipe, shape: ModelShape) -> list[int]:
    """Elements of all A, of all B, and of DoRA's magnitudes."""
    assert recipe.lora is not None
    linears = with_adapter(shape, recipe.lora)
    inputs, outputs = sum(linear.inputs for linear in linears), sum(linear.outputs for linear in linears)
    magnitudes = [outputs] if has_dora(recipe) else []
    return [shape.layers * size for size in (recipe.lora.r * inputs, recipe.lora.r * outputs, *magnitudes)]


def _add_tables(lasting: Lasting, shape: ModelShape, offload: Collection[str], element: int) -> None:
    table = shape.table * element
    if "embedding" in offload:
        lasting.host += table
    else:
        lasting.parts["embedding"] += allocated(table)
    if "head" in offload:
        lasting.host += pinned(table)
    elif not shape.tied:
        lasting.parts["head"] += allocated(table)


def _add_optimizer(lasting: Lasting, size: int, optimizer: str, element: int) -> None:
    """AdamW's two states for a tensor of `size` elements of `element` bytes; paged ones can leave the GPU."""
    if optimizer == "adamw":
        lasting.parts["optimizer"] += 2 * allocated(size * element)
        return
    eight = optimizer.endswith("8bit") and size >= LEAST_8BIT
    states = 2 * allocated(size * (1 if eight else 4))
    if optimizer.startswith("paged") and size >= LEAST_PAGED:
        lasting.host += states
    else:
        lasting.parts["optimizer"] += states
    if eight:  # a scale for every 256
        lasting.parts["optimizer"] += 2 * allocated(ceil(size / 256) * 4)


def _frozen_tensors(group: Group, recipe: Recipe, element: int) -> list[int]:
    """Bytes of each tensor that a stack of frozen weights is made from (frozen.FrozenLinears.tensors)."""
    if recipe.model.dtype != "nf4":
        return [group.whole * element]
    weights = group.inputs * group.outputs
    blocks = weights // NF4_BLOCK
    if not recipe.model.double_quant:
        return [weights // 2, blocks * 4]
    factors = blocks // NF4_GROUP * 4
    return [weights // 2, blocks, NF4_GROUP * 4, factors, factors]


def _small_tensors(shape: ModelShape, groups: list[Group], element: int) -> int:
    """Norms, biases (the layers' own, and those of each stack), and which layer of a stack each row belongs to."""
    biases = sum(allocated(linear.outputs * element) for linear in shape.linears if linear.bias)
    stacked = sum(allocated(group.outputs * element) for group in groups) if biases else 0
    owners = sum(allocated(group.outputs * 4) for group in groups if group.joined == "forward")
    norms = 2 * allocated(shape.width * element) + 2 * allocated(shape.head_dim * element) * shape.head_norms
    return shape.layers * (biases + stacked + owners + norms) + allocated(shape.width * element)
