"""The training loop, to be read from top to bottom.

`train()` prepares a run from a recipe; `_run()` is the loop. It emits events and knows nothing of who listens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed

from course_lib.chat.answers import answer_questions
from course_lib.data.collate import flatten, pad
from course_lib.data.dataset import Dataset, load_dataset
from course_lib.data.templates import ChatTemplate, choose_template
from course_lib.errors import CourseError, InputError
from course_lib.evaluation import held_out_loss
from course_lib.files import atomic_folder
from course_lib.models import load_model, load_tokenizer, model_folder
from course_lib.recipe import Recipe
from course_lib.training.adapters import add_lora, load_weights, save_weights
from course_lib.training.attention import SEGMENTS, attention, supports_segments
from course_lib.training.batches import StepPlan, plan_steps
from course_lib.training.checkpoint import (
    checkpoints,
    load_state,
    remove_checkpoints,
    save_bad_batch,
    save_checkpoint,
    set_random_state,
)
from course_lib.training.events import (
    CheckpointSaved,
    Event,
    HeldOutLoss,
    Listener,
    RunEnded,
    RunStarted,
    SampleAnswers,
    StepDone,
)
from course_lib.training.interrupt import interrupt_requested
from course_lib.training.listeners import MetricsFile, read_metrics
from course_lib.training.loss import supervised_loss, trained_tokens
from course_lib.training.memory import peak_memory_bytes, reset_peak_memory
from course_lib.training.optimizer import make_optimizer, make_schedule

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import PreTrainedTokenizerBase


class Interrupted(CourseError):
    """The run was stopped by Ctrl-C or SIGTERM after saving a checkpoint."""

    exit_code = 130


@dataclass
class _Run:
    """What the loop works on."""

    recipe: Recipe
    work_dir: Path
    accelerator: Accelerator
    model: Any  # a PeftModel, or a PreTrainedModel in full fine-tuning
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    base_folder: Path
    dataset: Dataset
    plan: StepPlan
    optimizer: Any
    schedule: LRScheduler
    listeners: list[Listener]
    flat: bool  # rows without padding; else padded rectangles

    def emit(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)

    def batch(self, examples: list) -> dict[str, Any]:
        """Tensors on the model's device. The segment edges stay on the CPU where attention runs once a segment, and go
        along where it takes them itself: no layer waits for a copy."""
        tensors = flatten(examples) if self.flat else pad(examples, pad_token_id=self.tokenizer.pad_token_id or 0)
        device = self.accelerator.device
        takes_edges = device.type == "cuda" and self.accelerator.mixed_precision != "no"
        stays = ("max_",) if takes_edges else ("max_", "cu_")
        return {
            name: value if name.startswith(stays) else value.to(device, non_blocking=True)
            for name, value in tensors.items()
        }

    @property
    def bare_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model)


def train(
    recipe: Recipe,
    *,
    work_dir: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    listeners: Sequence[Listener] = (),
) -> Path:
    """Train what the recipe says and return the folder of the adapter (or of the model, where `lora` is null).

    The work dir receives `recipe.yaml`, `metrics.jsonl` (one event a line), `checkpoint-*`, and `adapter/` or `model/`.

    Args:
        resume: go on from the newest checkpoint of the work dir; without one, start anew.
        overwrite: replace an earlier run in the work dir.
        listeners: called with every event (training/events.py).

    Raises:
        InputError: the recipe, its data or the work dir do not fit.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was saved.
        CourseError: the loss or a gradient went wrong, or a file could not be written.
    """
    work_dir = Path(work_dir)
    done = checkpoints(work_dir)
    if (done or (work_dir / "metrics.jsonl").exists()) and not (resume or overwrite):
        raise InputError(f"{work_dir}: already holds a run; add --resume to go on with it, or name another --work-dir")
    run = _prepare(recipe, work_dir)
    first_step = 0
    if resume and done:
        first_step = _restore(run, done[-1][1])
    elif overwrite:
        remove_checkpoints(work_dir)
    recipe.save(work_dir / "recipe.yaml")
    kept_events = (
        [event for event in read_metrics(work_dir) if event.get("step", 0) <= first_step] if first_step else []
    )
    with MetricsFile(work_dir / "metrics.jsonl", kept_events) as metrics:
        run.listeners = [metrics, *listeners]
        return _run(run, first_step)


def _prepare(recipe: Recipe, work_dir: Path) -> _Run:
    set_seed(recipe.training.seed)
    settings = recipe.model
    base_folder = model_folder(settings.name)
    tokenizer = load_tokenizer(base_folder, trust_remote_code=settings.trust_remote_code)
    template = choose_template(tokenizer, settings.template)
    dataset = load_dataset(
        recipe.data, template=template, tokenizer=tokenizer
    )  # before the model: wrong data is soon told
    model, _ = load_model(
        base_folder,
        dtype=settings.dtype,
        double_quant=settings.double_quant,
        compute_dtype=None if settings.compute_dtype == "auto" else settings.compute_dtype,
        trust_remote_code=settings.trust_remote_code,
    )
    if recipe.training.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.lora is not None:
        model = add_lora(model, recipe.lora)
    AcceleratorState._reset_state()  # a second run in one notebook may compute in another type
    accelerator = Accelerator(mixed_precision=_mixed_precision(model))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plan = plan_steps(dataset.train, recipe.data, recipe.training)
    optimizer = make_optimizer(trainable, recipe.training)
    model, optimizer = accelerator.prepare(model, optimizer)
    longest = int(max(dataset.train.lengths.max(), dataset.held_out.lengths.max(initial=0)))
    return _Run(
        recipe=recipe,
        work_dir=work_dir,
        accelerator=accelerator,
        model=model,
        tokenizer=tokenizer,
        template=template,
        base_folder=base_folder,
        dataset=dataset,
        plan=plan,
        optimizer=optimizer,
        schedule=make_schedule(optimizer, recipe.training, total_steps=plan.total_steps),
        listeners=[],
        flat=supports_segments(accelerator.unwrap_model(model), longest=longest),
    )


def _mixed_precision(model: Any) -> str:
    """Adapters are kept in float32; a base that computes in 16 bits is run under autocast of that type."""
    dtype = getattr(model, "dtype", torch.float32)
    return (
        {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "no")
        if model.device.type == "cuda" or dtype == torch.bfloat16
        else "no"
    )


def _run(run: _Run, first_step: int) -> Path:
    recipe, plan = run.recipe, run.plan
    started = time.perf_counter()
    trainable = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    run.emit(
        RunStarted(
            first_step=first_step,
            total_steps=plan.total_steps,
            trainable_parameters=sum(parameter.numel() for parameter in trainable),
            parameters=run.bare_model.num_parameters(),
            train_examples=len(run.dataset.train),
            held_out_examples=len(run.dataset.held_out),
            packs=len(plan.packs),
            data=run.dataset.report.summary(),
            work_dir=run.work_dir,
        )
    )
    if first_step == 0:
        _evaluate(run, step=0)
    reset_peak_memory()
    with _training_mode(run), interrupt_requested() as interrupted:
        for step in range(first_step, plan.total_steps):
            event = _step(run, step, trainable)
            done = step + 1
            if done % recipe.training.log_every == 0 or done == plan.total_steps:
                run.emit(event)
            if _is_due(recipe.evaluation.every, done) and done < plan.total_steps:
                _evaluate(run, step=done)
            if _is_due(recipe.training.checkpoint_every, done) or interrupted() or done == plan.total_steps:
                _checkpoint(run, step=done)
            if interrupted() and done < plan.total_steps:
                raise Interrupted(
                    f"stopped after step {done} of {plan.total_steps}; go on with the same command and --resume (checkpoint in {run.work_dir})"
                )
    if plan.total_steps > first_step:
        _evaluate(run, step=plan.total_steps)
    output = run.work_dir / ("adapter" if recipe.lora is not None else "model")
    with atomic_folder(output) as folder:
        save_weights(run.bare_model, folder, base_folder=run.base_folder, settings=recipe.model)
    run.emit(RunEnded(step=plan.total_steps, seconds=time.perf_counter() - started, output=output))
    return output


def _step(run: _Run, step: int, trainable: list[torch.nn.Parameter]) -> StepDone:
    """One optimizer step: every micro-batch's loss is divided by the trained tokens of all of them."""
    started = time.perf_counter()
    accelerator, settings = run.accelerator, run.recipe.training
    batches = [run.batch(examples) for examples in run.plan.micro_batches(step)]
    total_trained = sum(map(trained_tokens, batches))
    loss_sum = torch.zeros((), device=accelerator.device)
    for batch in batches:
        with accelerator.autocast():
            loss = supervised_loss(run.model, batch) / total_trained
        if not torch.isfinite(loss):
            save_bad_batch(run.work_dir, step=step + 1, batch=batch, loss=loss.item())
        accelerator.backward(loss)
        loss_sum += loss.detach()
    grad_norm = float(accelerator.clip_grad_norm_(trainable, settings.max_grad_norm))
    if grad_norm == 0:
        raise CourseError(
            f"step {step + 1}: the gradient is zero, so nothing is trained; check lora.targets and the data's labels"
        )
    lr = run.schedule.get_last_lr()[0]
    run.optimizer.step()
    run.schedule.step()
    run.optimizer.zero_grad()
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    loss_value = loss_sum.item()
    return StepDone(
        step=step + 1,
        total_steps=run.plan.total_steps,
        epoch=(step + 1) / run.plan.steps_per_epoch,
        loss=loss_value,
        lr=lr,
        grad_norm=grad_norm,
        tokens=tokens,
        trained_tokens=total_trained,
        tokens_per_second=tokens / (time.perf_counter() - started),
        memory_bytes=peak_memory_bytes(),
    )


@contextmanager
def _training_mode(run: _Run) -> Iterator[None]:
    base = run.bare_model.get_base_model() if hasattr(run.bare_model, "get_base_model") else run.bare_model
    run.model.train()
    try:
        if run.flat:
            with attention(base, SEGMENTS):
                yield
        else:
            yield
    finally:
        run.model.eval()


def _evaluate(run: _Run, *, step: int) -> None:
    """Held-out loss and sample answers, leaving the random generators and the training mode as they were."""
    settings = run.recipe.evaluation
    base = run.bare_model.get_base_model() if hasattr(run.bare_model, "get_base_model") else run.bare_model
    was_training = run.model.training
    run.model.eval()
    with torch.random.fork_rng(), attention(base, "sdpa"):
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
    run.model.train(was_training)


def _checkpoint(run: _Run, *, step: int) -> None:
    state = {
        "optimizer": run.optimizer.state_dict(),
        "schedule": run.schedule.state_dict(),
        "scaler": run.accelerator.scaler.state_dict() if run.accelerator.scaler else None,
        "recipe": run.recipe.model_dump(mode="json"),
    }
    path = save_checkpoint(
        run.work_dir,
        step=step,
        keep=run.recipe.training.keep_checkpoints,
        state=state,
        save_weights=lambda folder: save_weights(
            run.bare_model, folder, base_folder=run.base_folder, settings=run.recipe.model
        ),
    )
    run.emit(CheckpointSaved(step=step, path=path))


def _restore(run: _Run, folder: Path) -> int:
    state = load_state(folder, recipe=run.recipe.model_dump(mode="json"))
    load_weights(run.bare_model, folder)
    run.optimizer.load_state_dict(state["optimizer"])
    run.schedule.load_state_dict(state["schedule"])
    if run.accelerator.scaler and state["scaler"]:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    set_random_state(state["random"])
    return state["step"]


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
