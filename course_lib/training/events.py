"""What the training loop says while it runs. It writes and draws nothing: listeners do (training/listeners.py, widgets/)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunStarted:
    """Before the first step. `first_step` is 0, or where a resumed run goes on."""

    first_step: int
    total_steps: int
    trainable_parameters: int
    parameters: int
    train_examples: int
    held_out_examples: int
    packs: int
    data: str
    engine: str  # which layers compute: fused, or the model's own and why
    attention: str  # which attention they use, and why
    work_dir: Path
    processes: int = 1  # that train together, each on a GPU


@dataclass(frozen=True)
class StepDone:
    """After an optimizer step. `loss` is the mean over the trained tokens of the global batch, in nats."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float  # before clipping
    tokens: int  # in this step, prompts included
    trained_tokens: int
    tokens_per_second: float
    memory_bytes: int  # peak: allocated on the GPU, or resident on the CPU


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean loss over the trained tokens of the held-out rows, in nats."""

    step: int
    loss: float


@dataclass(frozen=True)
class SampleAnswers:
    """What the model answers to the recipe's evaluation questions, greedily: (question, answer) pairs."""

    step: int
    answers: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint folder is complete."""

    step: int
    path: Path


@dataclass(frozen=True)
class StepsProfiled:
    """Steps `first_step` to `step` were profiled; `path` is the page that says where their time went."""

    step: int
    first_step: int
    wanted: int  # steps; fewer were there where the run is shorter
    path: Path


@dataclass(frozen=True)
class RunEnded:
    """After the last step; `output` is the adapter's folder, or the model's after full fine-tuning."""

    step: int
    seconds: float
    output: Path


Event = RunStarted | StepDone | HeldOutLoss | SampleAnswers | CheckpointSaved | StepsProfiled | RunEnded
Listener = Callable[[Event], None]
