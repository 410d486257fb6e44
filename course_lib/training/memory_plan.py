"""Which settings make a training fit into a card's memory, and how much slower each is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, TypedDict

from course_lib.errors import InputError
from course_lib.model_shape import ModelShape
from course_lib.recipe import Recipe, with_overrides
from course_lib.training.memory_parts import tokens_a_batch
from course_lib.training.memory_prediction import MemoryPrediction, predict_memory

CARDS = tuple(size * 2**30 for size in (6, 8, 12, 16, 24, 48, 80))  # bytes of common cards
OFFLOADS = (
    (),
    ("embedding",),
    ("embedding", "head"),
    ("embedding", "checkpoints"),
    ("embedding", "head", "checkpoints"),
    ("layers",),
    ("embedding", "layers"),
    ("embedding", "head", "checkpoints", "layers"),
)
WIDER = 3.9  # times the bytes of NF4 that 16 bits take on their way: by the bytes, not measured
WORTH = 0.98  # of the memory of the candidate before: what saves less is not worth a line
SMALL_CHUNK = 256  # positions whose logits are there at one time: enough rows to keep a GPU's matrix units busy
SHORTEST = 128  # tokens: below this, rows are not proposed to be cut


class Shares(TypedDict):
    """`predict_memory`'s further arguments."""

    gpus: int
    shard: bool


@dataclass(frozen=True)
class Candidate:
    """Settings that fit.

    Attributes:
        overrides: what to set, as `--set` takes it; none where the recipe fits as it is.
        slow_down: expected time over that of the recipe as it is; below 1 is faster.
        trains_the_same: whether what is learnt stays the same but for rounding.
    """

    overrides: tuple[str, ...]
    prediction: MemoryPrediction
    slow_down: float
    trains_the_same: bool = True

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON takes it."""
        return {**asdict(self), "prediction": self.prediction.as_dict()}


def plan_within(recipe: Recipe, shape: ModelShape, vram: int, *, gpus: int = 1, shard: bool = False) -> list[Candidate]:
    """Settings under which a run fits into a card of `vram` bytes, the fastest first.

    Each further one is slower, or changes more, and needs less memory than all before it. Where nothing fits, the nearest settings
    that train something else (shorter rows, adapters instead of all weights) are looked for; the list is empty where there are none.
    """
    shares = Shares(gpus=gpus, shard=shard)
    found = _fitting(recipe, recipe, (), shape, vram, shares)
    for more in _other_trainings(recipe) if not found else ():
        if others := _fitting(recipe, with_overrides(recipe, more), more, shape, vram, shares):
            return [replace(others[0], trains_the_same=False)]
    return found


def _fitting(
    asked: Recipe, recipe: Recipe, begin: tuple[str, ...], shape: ModelShape, vram: int, shares: Shares
) -> list[Candidate]:
    """Settings that fit, each beginning with those that made `recipe` of the recipe that was asked about."""
    found = []
    for overrides in _variants(recipe):
        if fits := _with_least_checkpointing(recipe, overrides, shape, vram, shares):
            chosen, new, prediction = fits
            found.append(Candidate((*begin, *chosen), prediction, slow_down(asked, new, shape)))
    found.sort(key=lambda one: (round(one.slow_down, 2), len(one.overrides), one.prediction.needed))
    kept: list[Candidate] = []
    for candidate in found:
        if not kept or candidate.prediction.needed < WORTH * kept[-1].prediction.needed:
            kept.append(candidate)
    return kept


def slow_down(old: Recipe, new: Recipe, shape: ModelShape) -> float:
    """Expected time a token under new settings over that under the old ones, from `slow_downs.yaml`."""
    return _time_a_token(new, shape) / _time_a_token(old, shape)


def _time_a_token(recipe: Recipe, shape: ModelShape) -> float:
    measured, training = _measured(), recipe.training
    tokens = tokens_a_batch(recipe)
    again = min(1.0, int(training.gradient_checkpointing) / shape.layers)
    if training.gradient_checkpointing is True:
        again = 1.0
    time = (1 + (measured["checkpointing"] - 1) * again) / _at(measured["tokens_per_second"], tokens)
    if recipe.model.dtype == "nf4":
        time *= measured["nf4"]
    if training.loss_chunk and "head" not in training.offload:
        time *= measured["loss_chunk"]
    if "head" in training.offload:
        time *= _at(measured["head"], tokens)
    if "layers" in training.offload:
        time *= 1 + (_at(measured["layers"], tokens) - 1) * (1 if recipe.model.dtype == "nf4" else WIDER)
    return time


@cache
def _measured() -> dict[str, Any]:
    import yaml

    return yaml.safe_load((Path(__file__).parent / "slow_downs.yaml").read_text(encoding="utf-8"))


def _at(measured: Mapping[int, float], tokens: int) -> float:
    """Between measured numbers of tokens, on logarithmic scales; outside, the nearest."""
    known = sorted(measured)
    tokens = min(max(tokens, known[0]), known[-1])
    low = max(number for number in known if number <= tokens)
    high = min(number for number in known if number >= tokens)
    share = 0.0 if low == high else math.log(tokens / low) / math.log(high / low)
    return measured[low] * (measured[high] / measured[low]) ** share


def _variants(recipe: Recipe) -> Iterator[tuple[str, ...]]:
    """Overrides to try; how many layers are checkpointed is chosen for each."""
    training = recipe.training
    batches: list[tuple[str, ...]] = [()]
    if training.batch_size > 1:  # the same step in smaller batches
        accumulation = training.accumulation * training.batch_size
        batches.append(("training.batch_size=1", f"training.accumulation={accumulation}"))
    states: list[tuple[str, ...]] = [()]
    if training.optimizer == "adamw":
        states.append(("training.optimizer=adamw_8bit",))
    if training.optimizer != "paged_adamw_8bit":
        states.append(("training.optimizer=paged_adamw_8bit",))
    if recipe.lora and recipe.lora.dtype == "float32":
        states += [(*chosen, "lora.dtype=bfloat16") for chosen in states]
    formats: list[tuple[str, ...]] = [()]
    if recipe.lora and recipe.model.dtype != "nf4":
        formats.append(("model.dtype=nf4",))
    chunks: list[tuple[str, ...]] = [()]
    if recipe.lora and (training.loss_chunk or SMALL_CHUNK + 1) > SMALL_CHUNK:
        chunks.append((f"training.loss_chunk={SMALL_CHUNK}",))
    offloads: list[tuple[str, ...]] = [()]
    if recipe.lora:
        others = [parts for parts in OFFLOADS if {*parts} != {*training.offload}]
        offloads += [(f"training.offload=[{','.join(parts)}]",) for parts in others]
    for chosen in product(formats, states, batches, chunks, offloads):
        yield tuple(override for part in chosen for override in part)


def _with_least_checkpointing(
    recipe: Recipe, overrides: tuple[str, ...], shape: ModelShape, vram: int, shares: Shares
) -> tuple[tuple[str, ...], Recipe, MemoryPrediction] | None:
    """The overrides with as few checkpointed layers as fit, and what comes of them; None where even all are too few."""
    checkpointing = recipe.training.gradient_checkpointing

    def tried(layers: int) -> tuple[tuple[str, ...], Recipe, MemoryPrediction] | None:
        setting: bool | int = layers if 0 < layers < shape.layers - 1 else bool(layers)
        change = f"training.gradient_checkpointing={str(setting).lower()}"
        same = type(setting) is type(checkpointing) and setting == checkpointing
        chosen = overrides if same else (*overrides, change)
        try:
            new = with_overrides(recipe, chosen)
        except InputError:  # settings that exclude one another, such as int8 and an offloaded head
            return None
        prediction = predict_memory(new, shape, **shares)
        fits = prediction.needed <= vram and not (new.training.offload and prediction.engine == "plain")
        return (chosen, new, prediction) if fits else None

    low, high = 0, shape.layers - 1
    if found := tried(low):
        return found
    fits = tried(high)
    while fits and low + 1 < high:  # none is too few, `high` is enough
        middle = (low + high) // 2
        if found := tried(middle):
            fits, high = found, middle
        else:
            low = middle
    return fits


def _other_trainings(recipe: Recipe) -> Iterator[tuple[str, ...]]:
    """What trains something else, the nearest first."""
    begin: tuple[str, ...] = () if recipe.lora else ("lora.r=16",)
    if begin:
        yield begin
    length = recipe.data.max_length
    while (length := length // 2) >= SHORTEST:
        yield (*begin, f"data.max_length={length}")
