"""Listeners of the training loop: the metrics file and the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from course_lib.errors import CourseError
from course_lib.files import write_text
from course_lib.training.events import (
    CheckpointSaved,
    Event,
    HeldOutLoss,
    RunEnded,
    RunStarted,
    SampleAnswers,
    StepDone,
    StepsProfiled,
)

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """Every event as one line of JSON, flushed at once, so that a killed run keeps its history."""

    def __init__(self, path: Path, kept_events: Iterable[dict[str, Any]] = ()) -> None:
        self.path = path
        write_text(path, "".join(_line(event) for event in kept_events))

    def __enter__(self) -> Self:
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __call__(self, event: Event) -> None:
        """Append one event."""
        try:
            self._file.write(_line({"event": type(event).__name__, **asdict(event)}))
            self._file.flush()
        except OSError as error:
            raise CourseError(f"{self.path}: cannot be written ({error.strerror}); the run stopped") from error


def read_metrics(work_dir: Path) -> list[dict[str, Any]]:
    """Events of a run, oldest first; a last line cut short by a kill is left out."""
    path = Path(work_dir) / METRICS_FILE
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            break
    return events


class TerminalProgress:
    """A progress bar with loss, speed and time left, on stderr; plain lines where stderr is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None, numbers="", visible=True)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, RunStarted):
            self._say(event.data)
            share = event.trainable_parameters / event.parameters
            self._say(
                f"{event.train_examples} rows in {event.packs} packs, {event.total_steps} steps; training "
                f"{event.trainable_parameters:,} of {event.parameters:,} parameters ({share:.2%})"
            )
            together = f", in {event.processes} processes" if event.processes > 1 else ""
            self._say(f"computed by {event.engine}{together}")
            self._say(f"attention by {event.attention}")
            if event.held_out_examples:
                total = event.train_examples + event.held_out_examples
                self._say(f"{event.held_out_examples} rows held out of {total}")
            if event.first_step:
                self._say(f"resumed after step {event.first_step}")
            self._progress.update(self._task, total=event.total_steps, completed=event.first_step)
        elif isinstance(event, StepDone):
            numbers = (
                f"loss {event.loss:.3f}  {event.tokens_per_second:,.0f} tokens/s  {event.memory_bytes / 1e9:.1f} GB"
            )
            self._progress.update(self._task, completed=event.step, numbers=numbers)
            if not self.console.is_terminal:
                self._say(
                    f"step {event.step}/{event.total_steps}  {numbers}  grad norm {event.grad_norm:.2f}  lr {event.lr:.1e}"
                )
        elif isinstance(event, HeldOutLoss):
            self._say(f"step {event.step}: held-out loss {event.loss:.4f}")
        elif isinstance(event, SampleAnswers):
            for question, answer in event.answers:
                self._say(f"step {event.step}: {question} -> {' '.join(answer.split())}")
        elif isinstance(event, CheckpointSaved):
            self._say(f"step {event.step}: saved {event.path}")
        elif isinstance(event, StepsProfiled):
            steps = event.step - event.first_step + 1
            fewer = f" (the run has not {event.wanted} after warm-up)" if steps < event.wanted else ""
            self._say(f"profiled {steps} steps, {event.first_step} to {event.step}{fewer}: {event.path}")
        elif isinstance(event, RunEnded):
            self._say(f"trained in {event.seconds:.0f} s: {event.output}")

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _line(event: dict[str, Any]) -> str:
    return json.dumps(event, ensure_ascii=False, default=str) + "\n"
