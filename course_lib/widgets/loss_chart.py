"""A loss chart that grows while the model trains: a listener of the training loop."""

from __future__ import annotations

import base64
import io
import time
from typing import Any

import traitlets

from course_lib.training.events import Event, HeldOutLoss, RunEnded, RunStarted, StepDone
from course_lib.widgets.base import CourseWidget, script

_SECONDS_BETWEEN_UPDATES = 0.2  # a trait change is a message to the browser: five a second look smooth


class LossChart(CourseWidget):
    """Show it in a cell, then give it to `train(..., listeners=[chart])`.

    Its Pause button freezes the drawing alone: the run goes on. Interrupting the kernel saves a checkpoint and ends the run.
    """

    _esm = script("loss_chart.js")

    points = traitlets.List().tag(sync=True)  # [step, loss]
    held_out = traitlets.List().tag(sync=True)  # [step, loss]
    total_steps = traitlets.Int(0).tag(sync=True)
    status = traitlets.Unicode("waiting for the first step").tag(sync=True)

    def __init__(self, **traits: Any) -> None:
        super().__init__(**traits)
        self._waiting: list[list[float]] = []
        self._shown_at = 0.0

    def __call__(self, event: Event) -> None:
        """Take one event of the loop."""
        if isinstance(event, RunStarted):
            self.points, self.held_out = [], []
            self.total_steps = event.total_steps
        elif isinstance(event, StepDone):
            self._waiting.append([event.step, event.loss])
            if time.monotonic() - self._shown_at > _SECONDS_BETWEEN_UPDATES or event.step == event.total_steps:
                self._show(
                    f"step {event.step} of {event.total_steps}, loss {event.loss:.3f}, {event.tokens_per_second:.0f} tokens/s"
                )
        elif isinstance(event, HeldOutLoss):
            self.held_out = [*self.held_out, [event.step, event.loss]]
        elif isinstance(event, RunEnded):
            self.status = f"done: {event.step} steps in {event.seconds:.0f} s"

    def _show(self, status: str) -> None:
        self.points = [*self.points, *self._waiting]
        self.status = status
        self._waiting, self._shown_at = [], time.monotonic()

    def events(self) -> list[dict[str, Any]]:
        """The chart's points as events, the form `plots.loss_figure` draws."""
        steps = [{"event": "StepDone", "step": step, "loss": loss} for step, loss in self.points]
        return steps + [{"event": "HeldOutLoss", "step": step, "loss": loss} for step, loss in self.held_out]

    def __repr__(self) -> str:
        return f"LossChart: {self.status}"

    def twin(self) -> str:
        """The picture as it is now."""
        if not self.points:
            return f"<p><em>Loss chart: {self.status}.</em> The whole curve is drawn in a later cell.</p>"
        from course_lib.plots import loss_figure

        buffer = io.BytesIO()
        loss_figure(self.events()).savefig(buffer, format="png", dpi=80)
        return f'<img alt="loss by step" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
