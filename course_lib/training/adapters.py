"""LoRA adapters through peft, and the folder they are saved in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from course_lib.adapter_record import RECORD_FILE, base_fingerprint
from course_lib.data.tokenize import Example
from course_lib.errors import InputError, did_you_mean
from course_lib.files import atomic_file, read_json, write_text
from course_lib.models import catalogue
from course_lib.recipe import LoraSettings, ModelSettings
from course_lib.training.initialisation import (
    changes_base,
    for_changed_base,
    for_unchanged_base,
    start_from_activations,
    start_from_saved,
    start_from_weights,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def add_lora(
    model: PreTrainedModel,
    settings: LoraSettings,
    *,
    examples: Sequence[Example] = (),
    seed: int = 0,
    checkpoint: Path | None = None,
) -> PeftModel:
    """Put LoRA adapters on the model's linear layers and freeze the rest.

    With `init` pissa or olora the base's weights change; `save_weights` writes an adapter for the base as it was.

    Args:
        examples: what `init` eva takes activations of, chosen by `seed`.
        checkpoint: of the run that is to go on: the start is what it was there. `load_weights` brings A and B.

    Raises:
        InputError: a target names no linear layer of the model, the rank is above that of every layer, or `init` does not fit.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    _check_targets(model, settings)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, settings.dtype))
    if settings.init in ("pissa", "olora"):
        if checkpoint:
            start_from_saved(adapted, load_file(checkpoint / WEIGHTS))
        else:
            start_from_weights(adapted, settings.init)
    elif settings.init == "eva" and not checkpoint:
        start_from_activations(adapted, examples, seed=seed)
    return adapted


def save_weights(
    model: PeftModel | PreTrainedModel, folder: Path, *, base_folder: Path, settings: ModelSettings, protocol: str
) -> None:
    """Save the adapter (or, after full fine-tuning, the model) into `folder`, with a record of its base and of how its rows
    were written: template, and the protocol of tool calls."""
    from peft import PeftModel

    from course_lib.fetch import quiet_transformers

    if isinstance(model, PeftModel):
        # peft records the cache folder of this machine; others need the repository's name
        known = catalogue().get(settings.name)
        model.peft_config["default"].base_model_name_or_path = (known and known.hub) or settings.name
        model.save_pretrained(folder, save_embedding_layers=False)
        # peft writes an empty form; `course publish` makes the real card
        (folder / "README.md").unlink(missing_ok=True)
        if changes_base(model):
            config = read_json(folder / CONFIG)
            tensors, config = for_unchanged_base(model, load_file(folder / WEIGHTS), config)
            with atomic_file(folder / WEIGHTS) as temporary:  # the tensors may still be read from the file
                save_file(tensors, temporary, metadata={"format": "pt"})
            write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    else:
        with quiet_transformers():  # it draws a bar over the shards, beside that of the training
            model.save_pretrained(folder)
    record: dict[str, Any] = {
        "base": settings.name,
        "base_fingerprint": base_fingerprint(base_folder),
        "dtype": settings.dtype,
        "double_quant": settings.double_quant,
        "compute_dtype": str(_compute_dtype(model)).removeprefix("torch."),
        "template": settings.template,
        "protocol": protocol,
    }
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def load_weights(model: PeftModel | PreTrainedModel, folder: Path) -> None:
    """Load what `save_weights` wrote back into a model of the same shape.

    Raises:
        CourseError: the adapters there began from other changed weights than the model's.
    """
    from peft import PeftModel, set_peft_model_state_dict

    from course_lib.fetch import quiet_transformers

    if isinstance(model, PeftModel):
        tensors = load_file(folder / WEIGHTS)
        set_peft_model_state_dict(model, for_changed_base(model, tensors) if changes_base(model) else tensors)
        return
    with quiet_transformers():
        saved = type(model).from_pretrained(folder, dtype=model.dtype).state_dict()
    model.load_state_dict(saved)


def _compute_dtype(model: PeftModel | PreTrainedModel) -> Any:
    """What quantised weights are multiplied in; the weights' own type where they are not quantised."""
    quantisation = getattr(model.config, "quantization_config", None)
    return getattr(quantisation, "bnb_4bit_compute_dtype", None) or model.dtype


def _check_targets(model: PreTrainedModel, settings: LoraSettings) -> None:
    from torch import nn

    head = model.get_output_embeddings()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = {name.rsplit(".", 1)[-1] for name in linears}
    for target in settings.targets if isinstance(settings.targets, list) else []:
        if target.rsplit(".", 1)[-1] not in names:
            raise InputError(
                f"lora.targets: {target!r} is no linear layer of {model.config.model_type} (it has {', '.join(sorted(names))})"
                f"{did_you_mean(target, names)}"
            )
    # B A of a higher rank than W can have adds memory and nothing else; a slip such as 1e8 would take all there is
    ranks = [min(module.in_features, module.out_features) for module in linears.values() if module is not head]
    highest = max(ranks, default=settings.r)
    if settings.r > highest:
        raise InputError(f"lora.r = {settings.r}: no layer of this model has a rank above {highest}; 8 to 64 is usual")
