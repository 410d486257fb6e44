"""Checks of homework 02: LoRA and QLoRA, on matrices small enough to print."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from course_lib.homework.checks import call, cases, close, fail, short


def _matrices(seed: int, *, inputs: int = 5, outputs: int = 4, rank: int = 2) -> tuple[Any, ...]:
    """x (3, inputs), weight (outputs, inputs), a (rank, inputs), b (outputs, rank)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, inputs), (outputs, inputs), (rank, inputs), (outputs, rank)]
    return tuple(torch.randn(*shape, generator=generator) for shape in shapes)


def _same(given: Any, wanted: Any) -> bool:
    import torch

    return isinstance(given, torch.Tensor) and given.shape == wanted.shape and torch.allclose(given, wanted, atol=1e-5)


def _shape(given: Any, wanted: Any) -> None:
    import torch

    if not isinstance(given, torch.Tensor):
        fail("a tensor is wanted", short(given))
    if given.shape != wanted.shape:
        fail(
            f"the shape is {tuple(given.shape)} and should be {tuple(wanted.shape)}: are a matrix or two not transposed?"
        )


def forward(answer: Callable[..., Any], *, seed: int | None = None) -> None:
    """y = x Wᵀ + (alpha / r) x Aᵀ Bᵀ; wrong scales are known by what they give."""
    for number, (rank, alpha) in enumerate([(2, 8.0), (1, 3.0), (4, 4.0)]):
        x, weight, a, b = _matrices((seed or 0) + number, rank=rank)
        before = weight.clone()
        given = call(answer, x, weight, a, b, alpha)
        frozen, update = x @ before.T, x @ a.T @ b.T
        wanted = frozen + alpha / rank * update
        _shape(given, wanted)
        if not _same(weight, before):
            fail("the weight that is frozen was changed")
        if _same(given, wanted):
            continue
        shown = f"rank {rank}, alpha {alpha:g}"
        for diagnosis, value in {
            "the adapter is not scaled: alpha has no effect": frozen + update,
            "the adapter is scaled by alpha alone: with another rank it would be another learning rate": frozen
            + alpha * update,
            "the scale is upside down": frozen + rank / alpha * update,
            "the frozen weight is missing: this is the adapter alone": alpha / rank * update,
            "the adapter is missing: this is the frozen layer alone": frozen,
            "the frozen weight is scaled, too": alpha / rank * (frozen + update),
            "this is rsLoRA's scale, with the root of the rank": frozen + alpha / rank**0.5 * update,
        }.items():
            if _same(given, value):
                fail(diagnosis, shown)
        fail("not the frozen layer plus the scaled adapter", shown)


def start(answer: Callable[..., Any], *, seed: int | None = None) -> None:
    """A and B such that the model is unchanged, and can learn."""
    for rank, inputs, outputs in [(2, 6, 4), (8, 16, 32)]:
        pair = call(answer, rank, inputs, outputs)
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            fail("two matrices are wanted: A and B", short(pair))
        a, b = pair
        if tuple(a.shape) != (rank, inputs) or tuple(b.shape) != (outputs, rank):
            fail(
                f"A is (rank, inputs) and B (outputs, rank): yours are {tuple(a.shape)} and {tuple(b.shape)}",
                f"rank {rank}, inputs {inputs}, outputs {outputs}",
            )
        if float(a.abs().sum()) == 0 == float(b.abs().sum()):
            fail("both are zero: the gradient of each is a product with the other, so neither ever moves")
        if float((b @ a).abs().sum()) != 0:
            fail("B·A is not zero: the model is another one before the first step", f"rank {rank}")
        if float(a.abs().sum()) == 0:
            fail(
                "A is zero and B random: it can learn, but the weights that see the input start without direction; it is B that starts at zero"
            )
        if len({round(float(value), 6) for value in a.flatten()}) < a.numel() // 2:
            fail("the rows of A are alike: all ranks would learn the same")


def parameters(answer: Callable[..., Any], *, seed: int | None = None) -> None:
    """Trained numbers of an adapter on some linear layers, each (outputs, inputs)."""
    tried = [([(4, 3)], 2), ([(576, 576), (192, 576)], 8)]
    if more := cases(seed):
        tried.append(([(more.randint(10, 99), more.randint(10, 99)) for _ in range(5)], more.randint(2, 9)))
    for shapes, rank in tried:
        given = call(answer, list(shapes), rank)
        wanted = sum(rank * (outputs + inputs) for outputs, inputs in shapes)
        if close(given, wanted):
            continue
        shown = f"layers {shapes}, rank {rank}: yours {given}"
        for diagnosis, value in {
            "this is the full matrices: LoRA trains two narrow ones beside each": sum(
                outputs * inputs for outputs, inputs in shapes
            ),
            "this is A alone, or B alone": sum(rank * inputs for _, inputs in shapes),
            "this is B alone": sum(rank * outputs for outputs, _ in shapes),
            "this is B·A written out: that matrix is never kept": sum(
                rank * outputs * inputs for outputs, inputs in shapes
            ),
            "this is the first layer alone": rank * sum(shapes[0]),
            "the rank is missing": sum(outputs + inputs for outputs, inputs in shapes),
        }.items():
            if close(given, value):
                fail(diagnosis, shown)
        fail("count the numbers of A and of B, for each layer", shown)


def merge(answer: Callable[..., Any], *, seed: int | None = None) -> None:
    """One matrix that computes what layer and adapter do."""
    for number, (rank, alpha) in enumerate([(2, 8.0), (4, 2.0)]):
        _, weight, a, b = _matrices(50 + (seed or 0) + number, rank=rank, inputs=4, outputs=4)
        before = weight.clone()
        given = call(answer, weight, a, b, alpha)
        update = b @ a
        _shape(given, before)
        if not _same(weight, before):
            fail(
                "the weight you were given was changed: merge into a new one, or a second merge adds the adapter again"
            )
        if _same(given, before + alpha / rank * update):
            continue
        shown = f"rank {rank}, alpha {alpha:g}"
        for diagnosis, value in {
            "the scale is forgotten: the merged model is not the one that was trained": before + update,
            "scaled by alpha alone": before + alpha * update,
            "A and B are the wrong way round: transposed, it fits a square matrix and computes something else": before
            + alpha / rank * update.T,
            "the adapter is taken away, not added": before - alpha / rank * update,
        }.items():
            if _same(given, value):
                fail(diagnosis, shown)
        fail("layer and merged layer compute different things", shown)


def quantise(answer: Callable[..., Any], *, seed: int | None = None) -> None:
    """Blocks of values to whole numbers of -7 to 7 and back, each with a scale of its own."""
    import torch

    tried = [([0.3, -1.0, 0.25, 1.0], 4), ([0.1, 0.2, 100.0, -50.0], 2), ([0.0, 0.0, 3.0, 1.0], 2)]
    if more := cases(seed):
        tried.append(([more.gauss(0, 10.0 ** more.randint(-2, 2)) for _ in range(24)], 8))
    for values, block in tried:
        tensor = torch.tensor(values)
        given = call(answer, tensor.clone(), block)
        blocks = tensor.view(-1, block)
        largest = blocks.abs().amax(1, keepdim=True)
        scale = torch.where(largest > 0, largest / 7, torch.ones_like(largest))
        wanted = ((blocks / scale).round() * scale).flatten()
        _shape(given, wanted)
        shown = f"{short(values)} in blocks of {block} -> {short(given.tolist())}"
        if bool(torch.isnan(given).any()):
            fail("a block of zeros becomes nan: its scale is zero", shown)
        if _same(given, wanted):
            continue
        whole = tensor.abs().max() / 7
        floors = ((blocks / scale).floor() * scale).flatten()
        cut = ((blocks / scale).trunc() * scale).flatten()
        signed = blocks.amax(1, keepdim=True) / 7
        if _same(given, (tensor / whole).round() * whole):
            fail("one scale for all: a single large value takes all steps from the small ones of other blocks", shown)
        if _same(given, tensor):
            fail("nothing was rounded: these are the values themselves", shown)
        if _same(given, (blocks / scale).round().flatten()):
            fail("these are the whole numbers: scale them back", shown)
        if _same(given, floors) or _same(given, cut):
            fail("rounded down, or towards zero: the nearest step is wanted", shown)
        if _same(given, ((blocks / signed).round() * signed).flatten()):
            fail("the scale comes from the largest value, and a large negative one is forgotten", shown)
        if _same(given, ((blocks / (largest / 8)).round() * (largest / 8)).flatten()):
            fail("the largest value becomes 8 steps: there are 7 on each side", shown)
        fail("not the nearest of 15 steps between minus and plus the largest of each block", shown)


def memory_case(seed: int) -> dict[str, int]:
    """A model and an adapter to count the memory of."""
    source = random.Random(seed)
    return {
        "weights": 7_000_000_000 + 1_000_000 * source.randint(0, 700),
        "adapter": 40_000_000 + 1_000_000 * source.randint(0, 20),
    }


def memory(answer: Any, case: dict[str, int]) -> None:
    """Bytes of weights in 4 bits with a scale a block, and of the adapter with gradients and Adam's two states."""
    if answer is ...:
        raise NotImplementedError
    weights, adapter = case["weights"], case["adapter"]
    base, trained = weights / 2 + weights / 64 * 4, adapter * 16
    if close(answer, base + trained, relative=1e-6):
        return
    for diagnosis, value in {
        "the scales are forgotten: one of four bytes for every 64 weights": weights / 2 + trained,
        "gradients or Adam's states are forgotten: of every trained number there are four": base + adapter * 4,
        "the gradients, or one of Adam's two states, are forgotten": base + adapter * 12,
        "that is a byte a weight: four bits are half of one": weights + weights / 64 * 4 + trained,
        "gradients and states of the frozen weights are counted: they have none": base + weights * 12 + trained,
        "the adapter is forgotten": base,
    }.items():
        if close(answer, value, relative=1e-6):
            fail(diagnosis, f"yours is {float(answer) / 1e9:.2f} GB")
    fail(
        "add up: weights, their scales, and of the adapter the numbers, gradients and both states",
        f"yours is {float(answer) / 1e9:.2f} GB",
    )
