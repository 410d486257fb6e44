"""What a run is made of: model, data, plan and optimizer, prepared from a recipe; saved as checkpoints, and restored."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed

from course_lib.data.collate import flatten, pad
from course_lib.data.dataset import Dataset, load_dataset
from course_lib.data.templates import ChatTemplate, choose_template
from course_lib.errors import InputError
from course_lib.models import load_model, load_tokenizer, model_folder
from course_lib.recipe import DataSettings, Recipe, TrainingSettings
from course_lib.training.adapters import add_lora, load_weights, save_weights
from course_lib.training.attention import SEGMENTS, attention, supports_segments
from course_lib.training.batches import StepPlan, plan_steps
from course_lib.training.checkpoint import load_state, save_checkpoint, set_random_state
from course_lib.training.events import CheckpointSaved, Event, Listener
from course_lib.training.fused import FusedEngine, why_not_fused
from course_lib.training.loss import to_device
from course_lib.training.offload import load_on_host
from course_lib.training.optimizer import make_optimizer, make_schedule, parameter_groups
from course_lib.training.plain import PlainEngine

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import PreTrainedTokenizerBase

MOST_HELD_OUT = 0.2  # of the examples


@dataclass
class Run:
    """What the loop works on."""

    recipe: Recipe
    work_dir: Path
    accelerator: Accelerator
    model: Any  # a PeftModel, or a PreTrainedModel in full fine-tuning
    engine: FusedEngine | PlainEngine
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    base_folder: Path
    dataset: Dataset
    plan: StepPlan
    optimizer: Any
    schedule: LRScheduler
    flat: bool  # rows without padding; else padded rectangles
    listeners: list[Listener] = field(default_factory=list)
    # (examples, tokens of the first) of earlier micro-batches
    shapes: set[tuple[int, int]] = field(default_factory=set)

    def emit(self, event: Event) -> None:
        """Tell every listener."""
        for listener in self.listeners:
            listener(event)

    def batch(self, examples: list) -> dict[str, Any]:
        """Tensors on the model's device. Labels stay on the CPU, where they are counted and chosen from. So do the segment
        edges where attention runs once a segment; they go along where it takes them itself: no layer waits for a copy."""
        device = self.accelerator.device
        if not self.flat:
            padded = pad(examples, pad_token_id=self.tokenizer.pad_token_id or 0)
            return {name: value if name == "labels" else to_device(value, device) for name, value in padded.items()}
        lengths = [len(example.input_ids) for example in examples]
        # where this very shape came before, attention may plan for it; a plan for each new shape would cost more than it saves
        again = len({*lengths}) == 1 and (len(lengths), lengths[0]) in self.shapes
        self.shapes.add((len(lengths), lengths[0]))
        takes_edges = device.type == "cuda" and self.accelerator.mixed_precision != "no"
        stays = ("max_", "labels") if takes_edges else ("max_", "labels", "cu_")
        tensors = {
            name: value if name.startswith(stays) else to_device(value, device)
            for name, value in flatten(examples).items()
        }
        return {**tensors, "segments_alike": again}

    @property
    def bare_model(self) -> Any:
        """The model without accelerate's wrapping."""
        return self.accelerator.unwrap_model(self.model)

    @contextmanager
    def training_mode(self) -> Iterator[None]:
        """Dropout on, and attention for flat rows."""
        self.model.train()
        try:
            with attention(_base_model(self.bare_model), SEGMENTS) if self.flat else nullcontext():
                yield
        finally:
            self.model.eval()

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Dropout off, and attention for padded rows and for answers; mode and random generators are then as they were."""
        was_training = self.model.training
        self.model.eval()
        with torch.random.fork_rng(), attention(_base_model(self.bare_model), "sdpa"):
            try:
                yield
            finally:
                self.model.train(was_training)

    def save_weights(self, folder: Path) -> None:
        """Save the adapter, or after full fine-tuning the model."""
        save_weights(self.bare_model, folder, base_folder=self.base_folder, settings=self.recipe.model)

    def save_checkpoint(self, *, step: int) -> None:
        """Write all that `restore` needs."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "recipe": self.recipe.model_dump(mode="json"),
            "layers": type(self.engine).__name__,
        }
        keep = self.recipe.training.keep_checkpoints
        path = save_checkpoint(self.work_dir, step=step, keep=keep, state=state, save_weights=self.save_weights)
        self.emit(CheckpointSaved(step=step, path=path))

    def restore(self, checkpoint: Path) -> int:
        """Put everything back to where the checkpoint was saved, and return its step."""
        state = load_state(checkpoint, recipe=self.recipe.model_dump(mode="json"))
        if state.get("layers") != type(self.engine).__name__:
            raise InputError(
                f"{checkpoint}: was trained with other layers than {self.engine.description}, whose optimizer state is of another "
                "shape; go on where it was begun, or begin anew"
            )
        load_weights(self.bare_model, checkpoint)
        self.engine.after_step()
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        set_random_state(state["random"])
        return state["step"]


def prepare_run(recipe: Recipe, work_dir: Path, *, checkpoint: Path | None = None) -> Run:
    """Load what the recipe names. Nothing is written.

    Args:
        checkpoint: what will be restored; adapters that change the base's weights begin as they did there.

    Raises:
        InputError: the recipe, its model or its data do not fit, or the checkpoint was made from another recipe.
        CourseError: the checkpoint is damaged.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "WORLD_SIZE is above 1: training by several processes is not there yet; start one, without torchrun"
        )
    if checkpoint:
        load_state(checkpoint, recipe=recipe.model_dump(mode="json"), mapped=True)
    set_seed(recipe.training.seed)
    settings = recipe.model
    base_folder = model_folder(settings.name)
    tokenizer = load_tokenizer(base_folder, trust_remote_code=settings.trust_remote_code)
    template = choose_template(tokenizer, settings.template)
    # before the model: wrong data is soon told
    dataset = load_dataset(recipe.data, template=template, tokenizer=tokenizer)
    _check_held_out(dataset, recipe.data)
    offload = recipe.training.offload
    if {*offload} - {"checkpoints"}:
        model = load_on_host(base_folder, settings, offload=offload)
    else:
        model, _ = load_model(
            base_folder,
            dtype=settings.dtype,
            double_quant=settings.double_quant,
            compute_dtype=None if settings.compute_dtype == "auto" else settings.compute_dtype,
            trust_remote_code=settings.trust_remote_code,
        )
    _keep_quantised_weights(model)
    if recipe.lora is not None:
        seed = recipe.training.seed
        model = add_lora(model, recipe.lora, examples=dataset.train, seed=seed, checkpoint=checkpoint)
    AcceleratorState._reset_state()  # a second run in one notebook may compute in another type
    accelerator = Accelerator(mixed_precision=_mixed_precision(model))
    plan = plan_steps(dataset.train, recipe.data, recipe.training)
    longest = int(max(dataset.train.lengths.max(), dataset.held_out.lengths.max(initial=0)))
    flat = supports_segments(_base_model(model), longest=longest)
    model = accelerator.prepare_model(model, device_placement=not offload)
    engine = _make_engine(accelerator.unwrap_model(model), recipe.training, flat=flat, device=accelerator.device)
    lr_ratio = recipe.lora.lr_ratio if recipe.lora else 1
    groups = parameter_groups(engine.named_trainable, recipe.training, lr_ratio=lr_ratio)
    optimizer = accelerator.prepare(make_optimizer(groups, recipe.training))
    return Run(
        recipe=recipe,
        work_dir=work_dir,
        accelerator=accelerator,
        model=model,
        engine=engine,
        tokenizer=tokenizer,
        template=template,
        base_folder=base_folder,
        dataset=dataset,
        plan=plan,
        optimizer=optimizer,
        schedule=make_schedule(optimizer, recipe.training, total_steps=plan.total_steps),
        flat=flat,
    )


def _make_engine(
    model: Any, settings: TrainingSettings, *, flat: bool, device: torch.device
) -> FusedEngine | PlainEngine:
    """The fused layers where they apply."""
    reason = why_not_fused(model) if flat else "rows are padded"
    if not reason:
        checkpoint, offload = settings.gradient_checkpointing, settings.offload
        return FusedEngine(model, checkpoint=checkpoint, offload=offload, device=device)
    if settings.offload:
        raise InputError(f"training.offload = {settings.offload} needs the fused layers, which do not apply: {reason}")
    return PlainEngine(model, reason, checkpoint=settings.gradient_checkpointing)


def _keep_quantised_weights(model: Any) -> None:
    """Evaluation changes no weight: on some processors bitsandbytes would pack 4-bit ones anew there, and round their scales."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _base_model(model: Any) -> Any:
    """The model whose attention is set: peft's own wraps it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check_held_out(dataset: Dataset, settings: DataSettings) -> None:
    held_out, total = len(dataset.held_out), len(dataset.held_out) + len(dataset.train)
    if held_out > MOST_HELD_OUT * total:
        raise InputError(
            f"data.held_out = {settings.held_out} keeps {held_out} of {total} rows from being trained, more than a fifth; "
            f"set data.held_out={int(MOST_HELD_OUT * total)} or less (0 measures no held-out loss)"
        )


def _mixed_precision(model: Any) -> str:
    """Adapters are kept in float32; a base that computes in 16 bits is run under autocast of that type."""
    dtype = getattr(model, "dtype", torch.float32)
    return (
        {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "no")
        if torch.cuda.is_available() or dtype == torch.bfloat16
        else "no"
    )
