"""Which examples make up which step. Everything follows from the seed and the step number, so a resumed run needs no cursor."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from course_lib.data.collate import examples_of_pack
from course_lib.data.packing import plan_packs
from course_lib.data.tokenize import Example
from course_lib.recipe import DataSettings, TrainingSettings


@dataclass(frozen=True)
class StepPlan:
    """Packs of examples and how steps draw on them: `accumulation` micro-batches of `batch_size` packs a step."""

    packs: list[list[Example]]
    batch_size: int
    accumulation: int
    total_steps: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps to go once through all packs; the last one may be smaller."""
        return math.ceil(len(self.packs) / (self.batch_size * self.accumulation))

    def micro_batches(self, step: int) -> list[list[Example]]:
        """Examples of each micro-batch of step `step`, counted from 0. Each epoch has an order of its own."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = list(range(len(self.packs)))
        random.Random(f"{self.seed}-{epoch}").shuffle(order)
        size = self.batch_size * self.accumulation
        chosen = order[within * size : (within + 1) * size]
        groups = [chosen[start : start + self.batch_size] for start in range(0, len(chosen), self.batch_size)]
        return [[example for number in group for example in self.packs[number]] for group in groups]


def plan_steps(examples: Sequence[Example], data: DataSettings, training: TrainingSettings) -> StepPlan:
    """Pack the examples and count the steps of the run."""
    lengths = [len(example.input_ids) for example in examples]
    packs = plan_packs(lengths, max_length=data.max_length, strategy=data.packing, seed=training.seed)
    steps_per_epoch = math.ceil(len(packs) / (training.batch_size * training.accumulation))
    total_steps = max(1, math.ceil(training.epochs * steps_per_epoch))
    if training.max_steps is not None:
        total_steps = min(total_steps, training.max_steps)
    return StepPlan(
        packs=[examples_of_pack(packs, number, examples) for number in range(len(packs))],
        batch_size=training.batch_size,
        accumulation=training.accumulation,
        total_steps=total_steps,
        seed=training.seed,
    )
