"""What a step of a model's own layers holds under autograd: an estimate, from what each operation saves for its backward pass.

The count is that of Llama in transformers, with peft's adapters; `tests/training/test_plain_memory.py` compares it with what
autograd really keeps. Other families are counted by the same rules.
"""

from __future__ import annotations

from dataclasses import dataclass

from course_lib.model_shape import LinearShape, ModelShape
from course_lib.recipe import Recipe
from course_lib.training.memory_parts import (
    BYTES,
    computed_in,
    has_dora,
    optimizer_workspace,
    tokens_a_batch,
    with_adapter,
)

FLOAT32 = 4
SHARED_INPUT = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
A_LOGIT = 3 * FLOAT32  # of a logit's loss in backward: log softmax, its gradient, and the softmax's


@dataclass(frozen=True)
class Moment:
    """Bytes beyond the lasting ones at one moment of a step: `gradients` says what share of them is there by then."""

    name: str
    activations: int
    workspace: int
    gradients: float


def kept_by_layer(recipe: Recipe, shape: ModelShape) -> int:
    """Bytes that a decoder layer keeps of one token from forward to backward."""
    element = BYTES[computed_in(recipe)]
    queries = shape.heads * shape.head_dim
    # a norm keeps its input in float32, and for its own weight's gradient the normed value too; in 16 bits that is a copy
    norms = 2 * shape.width * (FLOAT32 + (element if recipe.lora is None else 0))
    attention = (
        4 * queries * element + shape.heads * FLOAT32
    )  # q, k and v for every head, output, log of the softmax's sum
    gate = 3 * shape.intermediate * element  # before and after the activation function, and what it is multiplied by
    head_norms = 2 * FLOAT32 * queries if shape.head_norms else 0
    return norms + attention + gate + head_norms + _inputs(recipe, shape, element)


def _inputs(recipe: Recipe, shape: ModelShape, element: int) -> int:
    """What linear layers keep of their inputs.

    An adapter in float32 makes a copy of its own, in the type it is multiplied in; but not beside a quantised layer, where peft leaves
    the input as it is under autocast.
    """
    lora = recipe.lora
    if lora is None:
        return _distinct(list(shape.linears)) * element
    linears, total = with_adapter(shape, lora), 0
    copies = lora.dropout > 0 or (BYTES[lora.dtype] != element and recipe.model.dtype not in ("nf4", "int8"))
    if recipe.model.dtype == "int8" and copies:  # the layer keeps what it multiplied too
        total += _distinct(list(shape.linears)) * element
    total += (sum(linear.inputs for linear in linears) if copies else _distinct(linears)) * element
    if lora.dropout:
        total += sum(linear.inputs for linear in linears)  # a mask of one byte
    if has_dora(recipe):  # what W gives and what the adapter gives, each to be scaled
        total += 2 * sum(linear.outputs for linear in linears) * element
    return total + lora.r * len(linears) * element


def _distinct(linears: list[LinearShape]) -> int:
    """Widths of the inputs that are tensors of their own: those of o are kept by attention already."""
    inputs = {}
    for linear in linears:
        name = linear.name.rsplit(".", 1)[-1]
        if name != "o_proj":
            inputs[SHARED_INPUT.get(name, linear.name)] = linear.inputs
    return sum(inputs.values())


def plain_moments(recipe: Recipe, shape: ModelShape, *, gpus: int = 1) -> list[Moment]:
    """The moments of a step at which most can be there."""
    element, tokens, layers = BYTES[computed_in(recipe)], tokens_a_batch(recipe), shape.layers
    checkpointing = recipe.training.gradient_checkpointing
    again = layers if checkpointing is True else min(checkpointing, layers)
    a_layer, an_input = tokens * kept_by_layer(recipe, shape), tokens * shape.width * element
    kept = again * an_input + (layers - again) * a_layer
    hidden = tokens * shape.width * (FLOAT32 + 2 * element)  # the last norm's input, and its output with a gradient
    earlier = 1.0 if recipe.training.accumulation > gpus else 0.0  # gradients of the micro-batches before
    lora_copies = _cast_adapters(recipe, shape)
    passing = tokens * element * (4 * shape.intermediate + 4 * shape.width) + _of_weights(recipe, shape)
    share = 1 / layers
    moments = [
        Moment("head and loss", kept + hidden + lora_copies, tokens * shape.vocabulary * A_LOGIT, earlier),
        Moment("backward pass", kept + (a_layer if again == layers else 0) + lora_copies, passing, max(earlier, share)),
        Moment("optimizer step", 0, optimizer_workspace(recipe, shape), 1.0),
    ]
    if again:
        moments.append(Moment("backward of the first layer", an_input + a_layer + lora_copies, passing, 1.0))
    return moments


def _cast_adapters(recipe: Recipe, shape: ModelShape) -> int:
    """Copies of float32 adapters in the type they are multiplied in, which autocast keeps for the step."""
    if recipe.lora is None or BYTES[recipe.lora.dtype] == BYTES[computed_in(recipe)]:
        return 0
    sides = sum(linear.inputs + linear.outputs for linear in with_adapter(shape, recipe.lora))
    return shape.layers * recipe.lora.r * sides * BYTES[computed_in(recipe)]


def _of_weights(recipe: Recipe, shape: ModelShape) -> int:
    """What is made of a linear layer's weights while it computes: NF4 dequantised; for DoRA, B A by way of an identity matrix, and W + B A."""
    element, most = BYTES[computed_in(recipe)], 0
    for linear in shape.linears:
        weights = linear.inputs * linear.outputs * element
        size = weights if recipe.model.dtype == "nf4" else 0
        if has_dora(recipe):
            size += linear.inputs**2 * (FLOAT32 + element) + 3 * weights
        most = max(most, size)
    return most
