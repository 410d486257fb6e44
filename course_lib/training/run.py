"""What a run is made of: model, data, plan and optimizer, prepared from a recipe; saved as checkpoints, and restored."""

from __future__ import annotations

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
from course_lib.data.templates import ChatTemplate, choose_template, named_template
from course_lib.errors import InputError
from course_lib.files import write_text
from course_lib.models import load_model, load_tokenizer, model_folder
from course_lib.recipe import DataSettings, Recipe, TrainingSettings
from course_lib.training.adapters import add_lora, load_weights, save_weights
from course_lib.training.attention import SEGMENTS, attention, supports_segments
from course_lib.training.batches import StepPlan, plan_steps
from course_lib.training.checkpoint import (
    checkpoint_folder,
    keep_newest,
    load_state,
    random_state,
    save_state,
    set_random_state,
)
from course_lib.training.distributed import (
    gather,
    join,
    main_first,
    process_count,
    process_index,
    same_everywhere,
    shared_folder,
)
from course_lib.training.events import CheckpointSaved, Event, Listener
from course_lib.training.fused import FusedEngine, why_not_fused
from course_lib.training.launch import is_main_process
from course_lib.training.loss import to_device
from course_lib.training.offload import load_on_host
from course_lib.training.optimizer import make_optimizer, make_schedule, parameter_groups
from course_lib.training.plain import PlainEngine
from course_lib.training.shards import ShardedPlaces
from course_lib.training.update import Update
from course_lib.training.zero import ZeroUpdate, zero_settings

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
    update: Update | ZeroUpdate
    schedule: LRScheduler
    flat: bool  # rows without padding; else padded rectangles
    parameters: int
    trainable_parameters: int
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
        """Save the adapter, or after full fine-tuning the model. All processes call it; the first one writes."""
        with self.update.whole_weights():
            if is_main_process():
                save_weights(
                    self.bare_model,
                    folder,
                    base_folder=self.base_folder,
                    settings=self.recipe.model,
                    protocol=self.recipe.data.protocol,
                )
                if self.recipe.lora is None:  # a whole model is loaded from its own folder
                    self._save_tokenizer(folder)

    def _save_tokenizer(self, folder: Path) -> None:
        """With the template that was trained with: whoever serves the model must use the same."""
        self.tokenizer.save_pretrained(folder)
        if self.recipe.model.template != "auto":
            write_text(folder / "chat_template.jinja", named_template(self.recipe.model.template).source)

    def save_checkpoint(self, *, step: int) -> None:
        """Write all that `restore` needs."""
        with shared_folder(checkpoint_folder(self.work_dir, step)) as folder:
            self.save_weights(folder)
            state = {
                **self.update.state(folder),
                "schedule": self.schedule.state_dict(),
                "recipe": self.recipe.model_dump(mode="json"),
                "layers": type(self.engine).__name__,
                "update": self.update.kind,
                "step": step,
                "threads": torch.get_num_threads(),
                "random": gather(random_state()),
            }
            if is_main_process():
                save_state(folder, state)
        if is_main_process():
            keep_newest(self.work_dir, self.recipe.training.keep_checkpoints)
        self.emit(CheckpointSaved(step=step, path=checkpoint_folder(self.work_dir, step)))

    def restore(self, checkpoint: Path) -> int:
        """Put everything back to where the checkpoint was saved, and return its step. The number of processes may be another."""
        state = load_state(checkpoint, recipe=self.recipe.model_dump(mode="json"))
        made_by = (state["layers"], state["update"])
        if made_by != (type(self.engine).__name__, self.update.kind):
            raise InputError(
                f"{checkpoint}: was trained by {' and '.join(made_by)}, whose optimizer state is of another shape than that of "
                f"{type(self.engine).__name__} and {self.update.kind}; go on as it was begun, or begin anew"
            )
        if isinstance(self.update, Update):
            load_weights(self.bare_model, checkpoint)
        self.update.restore(state, checkpoint)
        self.schedule.load_state_dict(state["schedule"])
        if process_index() < len(state["random"]):
            set_random_state(state["random"][process_index()])
        return state["step"]


def prepare_run(
    recipe: Recipe,
    work_dir: Path,
    *,
    checkpoint: Path | None = None,
    deepspeed: str | None = None,
    shard: bool = False,
) -> Run:
    """Load what the recipe names. Nothing is written.

    Args:
        checkpoint: what will be restored; adapters that change the base's weights begin as they did there.
        deepspeed: name or file of settings of DeepSpeed's ZeRO (zero.py).
        shard: spread the frozen layers over the processes' GPUs (shards.py).

    Raises:
        InputError: the recipe, its model or its data do not fit, or the checkpoint was made from another recipe.
        CourseError: the checkpoint is damaged.
    """
    zero = zero_settings(deepspeed, recipe) if deepspeed else None
    device = join(alone=bool(zero or shard))
    _check_shares(recipe.training)
    if shard and recipe.lora and recipe.lora.init == "eva":
        raise InputError("lora.init = eva runs the whole base, which --fsdp spreads out; set lora.init to default")
    if checkpoint:
        load_state(checkpoint, recipe=recipe.model_dump(mode="json"), mapped=True)
    set_seed(recipe.training.seed)
    settings = recipe.model
    with main_first():
        base_folder = model_folder(settings.name)
        tokenizer = load_tokenizer(base_folder, trust_remote_code=settings.trust_remote_code)
        template = choose_template(tokenizer, settings.template)
        # before the model: wrong data is soon told
        dataset = load_dataset(recipe.data, template=template, tokenizer=tokenizer)
    _check_held_out(dataset, recipe.data)
    offload = recipe.training.offload
    if {*offload} - {"checkpoints"} or shard:
        model = load_on_host(base_folder, settings, layers="layers" in offload or shard)
    else:
        model, _ = load_model(
            base_folder,
            dtype=settings.dtype,
            device=str(device),
            double_quant=settings.double_quant,
            compute_dtype=None if settings.compute_dtype == "auto" else settings.compute_dtype,
            trust_remote_code=settings.trust_remote_code,
        )
    _keep_quantised_weights(model)
    if recipe.lora is not None:
        seed = recipe.training.seed
        model = add_lora(model, recipe.lora, examples=dataset.train, seed=seed, checkpoint=checkpoint)
    AcceleratorState._reset_state(reset_partial_state=True)  # a second run in one notebook may compute in another type
    accelerator = Accelerator(mixed_precision=_mixed_precision(model))
    plan = plan_steps(dataset.train, recipe.data, recipe.training)
    longest = int(max(dataset.train.lengths.max(), dataset.held_out.lengths.max(initial=0)))
    flat = supports_segments(_base_model(model), longest=longest)
    # as if for evaluation: it is the loop that sums gradients, not a wrapper of the model
    model = accelerator.prepare_model(model, device_placement=not (offload or shard), evaluation_mode=True)
    reason = "rows are padded" if not flat else "DeepSpeed hooks into autograd" if zero else ""
    engine = _make_engine(accelerator.unwrap_model(model), recipe.training, reason=reason, device=device, shard=shard)
    parameters = accelerator.unwrap_model(model).num_parameters()
    trainable_parameters = sum(parameter.numel() for parameter in engine.trainable)
    same_everywhere(engine.trainable)
    engine.after_step()
    torch.manual_seed(recipe.training.seed + process_index())  # other dropout in every process
    lr_ratio = recipe.lora.lr_ratio if recipe.lora else 1
    groups = parameter_groups(engine.named_trainable, recipe.training, lr_ratio=lr_ratio)
    optimizer = make_optimizer(groups, recipe.training)
    update: Update | ZeroUpdate
    if zero:
        assert isinstance(engine, PlainEngine)
        dtype, norm = _base_model(model).dtype, recipe.training.max_grad_norm
        update = ZeroUpdate(engine, optimizer, zero, dtype=dtype, max_grad_norm=norm)
    else:
        update = Update(accelerator, engine, optimizer, max_grad_norm=recipe.training.max_grad_norm)
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
        update=update,
        schedule=make_schedule(update.optimizer, recipe.training, total_steps=plan.total_steps),
        flat=flat,
        parameters=parameters,
        trainable_parameters=trainable_parameters,
    )


def _make_engine(
    model: Any, settings: TrainingSettings, *, reason: str, device: torch.device, shard: bool
) -> FusedEngine | PlainEngine:
    """The fused layers where they apply; `reason` says why they do not, where that is known."""
    reason = reason or why_not_fused(model)
    if not reason:
        return FusedEngine(
            model,
            checkpoint=settings.gradient_checkpointing,
            offload=settings.offload,
            device=device,
            places=ShardedPlaces if shard else None,
            loss_chunk=settings.loss_chunk,
        )
    if settings.offload:
        raise InputError(f"training.offload = {settings.offload} needs the fused layers, which do not apply: {reason}")
    if shard:
        instead = "leave it out" if hasattr(_base_model(model), "hf_quantizer") else "use --deepspeed zero3"
        raise InputError(f"--fsdp needs the fused layers, which do not apply ({reason}); {instead}")
    return PlainEngine(model, reason, checkpoint=settings.gradient_checkpointing)


def _check_shares(settings: TrainingSettings) -> None:
    """A step's micro-batches are shared out: each process must have as many."""
    count, rest = process_count(), settings.accumulation % process_count()
    if rest:
        packs = settings.batch_size * settings.accumulation
        same = f" training.batch_size={packs // count} training.accumulation={count} takes the same steps"
        raise InputError(
            f"training.accumulation = {settings.accumulation}: the micro-batches of a step cannot be shared out evenly among {count} "
            f"processes; set a multiple of {count}{';' + same if packs % count == 0 else ''}"
        )


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
