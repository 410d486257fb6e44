"""The training loop, to be read from top to bottom.

`train()` claims the work dir and prepares a run from a recipe; `_run()` is the loop. It emits events and knows nothing of who listens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from course_lib.chat.answers import answer_questions
from course_lib.errors import CourseError
from course_lib.evaluation import held_out_loss
from course_lib.files import lock
from course_lib.recipe import Recipe
from course_lib.training.attention import describe_attention
from course_lib.training.checkpoint import remove_checkpoints, save_bad_batch
from course_lib.training.distributed import (
    OtherProcessEnded,
    any_process,
    from_main,
    join,
    leave,
    leave_alone,
    process_count,
    process_index,
    shared_folder,
    sum_over_processes,
    sum_tensor,
)
from course_lib.training.events import HeldOutLoss, Listener, RunEnded, RunStarted, SampleAnswers, StepDone
from course_lib.training.interrupt import Interrupted, interrupt_requested, interrupts_told
from course_lib.training.launch import is_main_process
from course_lib.training.listeners import METRICS_FILE, MetricsFile
from course_lib.training.loss import trained_tokens
from course_lib.training.memory import memory_errors, peak_memory_bytes, reset_peak_memory
from course_lib.training.parts import STEP, part_of
from course_lib.training.profile import profiled_steps
from course_lib.training.run import Run, prepare_run
from course_lib.training.work_dir import checkpoint_to_resume, events_until


def train(
    recipe: Recipe,
    *,
    work_dir: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    listeners: Sequence[Listener] = (),
    resume_hint: str = "go on with train(…, resume=True)",
    deepspeed: str | None = None,
    shard: bool = False,
    profile: bool = False,
) -> Path:
    """Train what the recipe says and return the folder of the adapter (or of the model, where `lora` is null).

    The work dir receives `recipe.yaml`, `metrics.jsonl` (one event a line), `checkpoint-*`, and `adapter/` or `model/`.

    Args:
        resume: go on from the newest checkpoint of the work dir; a run that was stopped before it had one begins anew.
        overwrite: replace an earlier run in the work dir.
        listeners: called with every event (training/events.py).
        resume_hint: what a person who stopped the run is told to do to go on.
        deepspeed: train under DeepSpeed's ZeRO: zero1, zero2, zero3, zero2_offload, zero3_offload, or a file of its settings.
        shard: spread the frozen layers over the GPUs.
        profile: measure where the time of a few steps goes, into `profile/` (profile.py).

    Started as one of several processes (training/launch.py), it trains with the others; the first one alone writes, and tells
    the listeners.

    Raises:
        InputError: the recipe, its data or the work dir do not fit, or another run is at work in it.
        Interrupted: Ctrl-C or SIGTERM, and a checkpoint is there. Before there is one, Ctrl-C is a plain KeyboardInterrupt.
        CourseError: the loss or a gradient went wrong, memory ran out, or a file could not be written.
    """
    work_dir = Path(work_dir)
    earlier = {"resume": resume, "overwrite": overwrite}
    try:
        join(alone=bool(deepspeed or shard))
        # a wrong folder is told before the model is loaded
        checkpoint = from_main(lambda: checkpoint_to_resume(work_dir, **earlier))
        with memory_errors(recipe, shard=shard, foretold=deepspeed is None):
            run = prepare_run(recipe, work_dir, checkpoint=checkpoint, deepspeed=deepspeed, shard=shard)
            with lock(work_dir) if is_main_process() else nullcontext(), interrupts_told(work_dir, resume_hint):
                checkpoint = from_main(lambda: checkpoint_to_resume(work_dir, **earlier))
                first_step = run.restore(checkpoint) if checkpoint else 0
                if not is_main_process():
                    output = _run(run, first_step, resume_hint)
                else:
                    if overwrite and not checkpoint:
                        remove_checkpoints(work_dir)
                    recipe.save(work_dir / "recipe.yaml")
                    kept_events = events_until(work_dir, first_step) if first_step else []
                    with MetricsFile(work_dir / METRICS_FILE, kept_events) as metrics:
                        run.listeners = [metrics, *listeners]
                        output = _run(run, first_step, resume_hint, profile=profile)
            leave()
            return output
    finally:
        leave_alone()


def _run(run: Run, first_step: int, resume_hint: str, *, profile: bool = False) -> Path:
    recipe, total_steps = run.recipe, run.plan.total_steps
    started = time.perf_counter()
    run.emit(
        RunStarted(
            first_step=first_step,
            total_steps=total_steps,
            trainable_parameters=run.trainable_parameters,
            parameters=run.parameters,
            train_examples=len(run.dataset.train),
            held_out_examples=len(run.dataset.held_out),
            packs=len(run.plan.packs),
            data=run.dataset.report.summary(),
            engine=run.engine.description,
            attention=describe_attention(
                flat=run.flat, device=run.accelerator.device, mixed_precision=run.accelerator.mixed_precision
            ),
            processes=process_count(),
            work_dir=run.work_dir,
        )
    )
    if first_step == 0:
        _evaluate(run, step=0)
    reset_peak_memory()
    steps = profiled_steps(run, range(first_step, total_steps), wanted=profile)
    with run.training_mode(), interrupt_requested() as interrupted, steps as numbers:
        asked = partial(any_process, interrupted)
        launched: _Launched | None = None
        for step in numbers:
            before, launched = launched, _launch(run, step)
            if before:  # its figures are waited for while the GPU already has the next step to do
                _tell(run, before)
            if run.accelerator.device.type != "cuda":  # where a step is done when it has been launched
                _tell(run, launched)
                launched = None
            done = step + 1
            # asked once, and of all: what is said below of a checkpoint must be true
            stop = asked()
            evaluate = _is_due(recipe.evaluation.every, done) and done < total_steps
            save = _is_due(recipe.training.checkpoint_every, done) or stop or done == total_steps
            if launched and (evaluate or save):
                _tell(run, launched)
                launched = None
            if evaluate:
                _evaluate(run, step=done)
            if save:
                run.save_checkpoint(step=done)
            if stop:
                break
        if asked():
            raise Interrupted(
                f"stopped after step {step + 1} of {total_steps}; {resume_hint} (checkpoint in {run.work_dir})"
            )
    _evaluate(run, step=total_steps)
    output = run.work_dir / ("adapter" if recipe.lora is not None else "model")
    with shared_folder(output) as folder:
        run.save_weights(folder)
    run.emit(RunEnded(step=total_steps, seconds=time.perf_counter() - started, output=output))
    return output


class _Clock:
    """Seconds between two points of the work given to a device."""

    def __init__(self, device: torch.device) -> None:
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self.times = [time.perf_counter(), 0.0]
        if self.events:
            self.events[0].record()

    def stop(self) -> None:
        """The second point."""
        self.times[1] = time.perf_counter()
        if self.events:
            self.events[1].record()

    def seconds(self) -> float:
        """Waits until the device is past the second point."""
        if not self.events:
            return self.times[1] - self.times[0]
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1000


@dataclass
class _Launched:
    """A step whose work has been given to the device. Counts are those of all processes, batches of this one."""

    step: int
    batches: list[dict[str, Any]]
    tokens: int
    trained_tokens: int
    lr: float
    figures: (
        torch.Tensor
    )  # loss of each micro-batch, sum of all processes' losses, gradient norm: on their way to the CPU
    clock: _Clock


@part_of(STEP)
def _launch(run: Run, step: int) -> _Launched:
    """Give one optimizer step to the device: every micro-batch's loss is divided by the trained tokens of all of them."""
    clock = _Clock(run.accelerator.device)
    share = {"index": process_index(), "count": process_count()}
    batches = [run.batch(examples) for examples in run.plan.micro_batches(step, **share)]
    own = batches[: len(batches) - run.plan.fillers(step, **share)]
    counts = [sum(batch["input_ids"].numel() for batch in own), sum(map(trained_tokens, own))]
    tokens, total_trained = sum_over_processes(counts)
    losses = []
    for number, batch in enumerate(batches, 1):
        with run.update.autocast():
            loss = run.engine.loss(batch) / total_trained * (number <= len(own))
        run.update.backward(loss, last=number == len(batches))
        losses.append(loss.detach())
    lr = run.schedule.get_last_lr()[0]
    norm = run.update.step()
    run.schedule.step()
    total = sum_tensor(torch.stack(losses).sum())
    figures = torch.stack([*losses, total, norm.to(total)]).to("cpu", non_blocking=True)
    clock.stop()
    return _Launched(step + 1, batches, tokens, total_trained, lr, figures, clock)


def _tell(run: Run, launched: _Launched) -> None:
    """Wait for a step's figures, check them and emit them.

    Raises:
        CourseError: the loss is no number, or the gradient is zero. No checkpoint has been saved since.
    """
    seconds = launched.clock.seconds()  # waits until the step is done
    step, recipe = launched.step, run.recipe
    *losses, total, grad_norm = launched.figures.tolist()
    for batch, loss in zip(launched.batches, losses, strict=True):
        if not math.isfinite(loss):
            save_bad_batch(run.work_dir, step=step, batch=batch, loss=loss)
    if not math.isfinite(total):
        raise OtherProcessEnded(f"step {step}: the loss of another process is {total}")
    if grad_norm == 0:
        raise CourseError(
            f"step {step}: the gradient is zero, so nothing is trained; check lora.targets and the data's labels"
        )
    if step % recipe.training.log_every and step != run.plan.total_steps:
        return
    run.emit(
        StepDone(
            step=step,
            total_steps=run.plan.total_steps,
            epoch=step / run.plan.steps_per_epoch,
            loss=total,
            lr=launched.lr,
            grad_norm=grad_norm,
            tokens=launched.tokens,
            trained_tokens=launched.trained_tokens,
            tokens_per_second=launched.tokens / seconds,
            memory_bytes=peak_memory_bytes(),
        )
    )


def _evaluate(run: Run, *, step: int) -> None:
    """Held-out loss and sample answers."""
    settings = run.recipe.evaluation
    with run.evaluation_mode():
        if run.dataset.held_out:
            run.emit(HeldOutLoss(step=step, loss=held_out_loss(run.bare_model, run.dataset.held_out)))
        if settings.questions:
            answers = answer_questions(
                run.bare_model,
                run.tokenizer,
                settings.questions,
                template=run.template,
                system=settings.system,
                max_new_tokens=settings.max_new_tokens,
            )
            run.emit(SampleAnswers(step=step, answers=tuple(zip(settings.questions, answers, strict=True))))


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
