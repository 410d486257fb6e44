"""Which examples make up which step. Everything follows from the seed and the step number, so a resumed run needs no cursor."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from course_lib.data.collate import examples_of_pack
from course_lib.data.examples import Examples
from course_lib.data.packing import PackPlan, plan_packs
from course_lib.data.tokenize import Example
from course_lib.recipe import DataSettings, TrainingSettings


@dataclass(frozen=True)
class StepPlan:
    """Packs of examples and how steps draw on them: `accumulation` micro-batches of `batch_size` packs a step."""

    examples: Sequence[Example]
    packs: PackPlan
    batch_size: int
    accumulation: int
    total_steps: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps to go once through all packs; the last one may be smaller."""
        return math.ceil(len(self.packs) / (self.batch_size * self.accumulation))

    def micro_batches(self, step: int, *, index: int = 0, count: int = 1) -> list[list[Example]]:
        """Examples of each micro-batch of step `step`, counted from 0, that falls to process `index` of `count`.

        Each epoch has an order of its own. An epoch's last step may be smaller; see `fillers`.
        """
        groups = self._groups(step)
        own = groups[index::count] + groups[: self.fillers(step, index=index, count=count)]
        return [
            [example for number in group for example in examples_of_pack(self.packs, number, self.examples)]
            for group in own
        ]

    def fillers(self, step: int, *, index: int, count: int) -> int:
        """How many of those micro-batches, at the end, belong to another process: they are computed and count for nothing.

        Processes that fetch weights from one another must compute as many micro-batches each.
        """
        groups = len(self._groups(step))
        return math.ceil(groups / count) - len(range(index, groups, count))

    def _groups(self, step: int) -> list[list[int]]:
        epoch, within = divmod(step, self.steps_per_epoch)
        order = _order(len(self.packs), f"{self.seed}-{epoch}")
        size = self.batch_size * self.accumulation
        chosen = order[within * size : (within + 1) * size]
        return [chosen[start : start + self.batch_size] for start in range(0, len(chosen), self.batch_size)]


@lru_cache(maxsize=1)
def _order(packs: int, seed: str) -> list[int]:
    order = list(range(packs))
    random.Random(seed).shuffle(order)
    return order


def plan_steps(examples: Examples, data: DataSettings, training: TrainingSettings) -> StepPlan:
    """Pack the examples and count the steps of the run."""
    packs = plan_packs(examples.lengths, max_length=data.max_length, strategy=data.packing, seed=training.seed)
    steps_per_epoch = math.ceil(len(packs) / (training.batch_size * training.accumulation))
    total_steps = max(1, math.ceil(training.epochs * steps_per_epoch))
    if training.max_steps is not None:
        total_steps = min(total_steps, training.max_steps)
    return StepPlan(
        examples=examples,
        packs=packs,
        batch_size=training.batch_size,
        accumulation=training.accumulation,
        total_steps=total_steps,
        seed=training.seed,
    )
