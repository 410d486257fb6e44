"""Merging a LoRA adapter into its base model, tensor by tensor, without loading the model.

W' = W + scaling * B A (Hu et al. 2021, arXiv 2106.09685); scaling is alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732).
With DoRA (Liu et al. 2024, arXiv 2402.09353) each output's row of W' is then given the length, its magnitude, that was trained.
An adapter trained on a quantised base was fitted to the rounded weights, so W is then the quantised and dequantised weight.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.adapter_record import RECORD_FILE, check_adapter, read_record
from course_lib.errors import CourseError, InputError
from course_lib.export.adapter_changes import Change, adapter_changes, model_structure
from course_lib.export.model_files import (
    OUTPUT_DTYPES,
    check_room,
    copy_side_files,
    plan_shards,
    total_bytes,
    write_shards,
)
from course_lib.export.stored import Stored, open_weights, stored_tensors
from course_lib.files import atomic_folder, file_to_write, read_json, write_text
from course_lib.internlm.adapter import llama_names
from course_lib.internlm.layout import layout_of
from course_lib.models import model_folder
from course_lib.sizes import parse_size

if TYPE_CHECKING:
    import torch

# Settings of peft's LoraConfig under which an adapter is more than W + scaling * B A with magnitudes.
NOT_PLAIN = (
    *("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "layer_replication"),
    *("alora_invocation_tokens", "target_parameters", "trainable_token_indices"),
)
# Other starts (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base weights: an adapter that still says so does not fit the base
# on disk. Trainings here save one that does (training/initialisation.py).
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def merge(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: str = "auto",
    max_shard_size: str | int = "2GB",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write base + adapter as a whole transformers model to the folder `out`, and return `out`.

    `base` is a folder, a catalogue name or `owner/name`; `adapter` a peft folder. Sums are in float32 on the CPU and are cast
    to `dtype`: float32, bfloat16, float16, or auto, each tensor's own on disk. Memory needed: about one shard and one layer.
    `max_shard_size` is in bytes, or text such as 500MB or 2GiB; a larger tensor gets a shard to itself. With `overwrite` an
    older model in `out` is replaced once the new one is complete. `progress(done, total)`, in bytes, is called after each tensor.

    Where the adapter's course.json says nf4 or int8, every linear layer that bitsandbytes quantises is quantised and dequantised
    first, in `compute_dtype` if the record names one, else in float32. Without course.json the base is taken as it is on disk.
    `trust_remote_code` runs Python from the base's folder; without it such a base merges unless the adapter is for nf4 or int8.

    Raises:
        InputError: the adapter is of another base or neither LoRA nor DoRA; it changes a tied embedding or a tensor the base does not have;
            the base is stored quantised; `out` exists or overlaps base or adapter; a wrong option.
        CourseError: the disk is full (an older `out` is as it was), a sum is not finite in `dtype`, or fetching the base failed.
    """
    base, adapter, target = model_folder(base), Path(adapter).expanduser(), Path(out).expanduser().resolve()
    check_adapter(adapter, base)
    if dtype not in ("auto", *OUTPUT_DTYPES):
        raise InputError(f"dtype {dtype!r} is unknown: choose auto, {', '.join(OUTPUT_DTYPES)}")
    limit = parse_size(max_shard_size, of="max_shard_size")
    _check_out(target, [base, adapter], overwrite=overwrite)
    config = read_json(base / "config.json")
    lora, trained = llama_names(adapter, base)
    _check_plain_lora(lora, adapter)
    record = read_record(adapter)
    stored = stored_tensors(base, quantised="quantization_config" in config)
    layout = layout_of(base)
    parameters = {
        name: Stored(tensor.file, shape, tensor.dtype)
        for stored_name, tensor in stored.items()
        for name, shape in zip(layout.names(stored_name), layout.shapes(stored_name, tensor.shape), strict=True)
    }
    structure = model_structure(base, config, parameters, record, trust_remote_code=trust_remote_code)

    import torch

    shards, done = plan_shards(stored, dtype, limit), 0
    total = total_bytes(shards)
    changes = adapter_changes(adapter, trained, lora, parameters, structure)

    def merged(names: list[str]) -> dict[str, torch.Tensor]:
        nonlocal done
        tensors: dict[str, torch.Tensor] = {}
        # Opened anew for each shard: closing gives the mapped pages of the base back.
        with ExitStack() as stack:
            opened = {path: stack.enter_context(open_weights(path)) for path in {stored[name].file for name in names}}
            for name in names:
                weight = opened[stored[name].file].get_tensor(name)
                final = getattr(torch, dtype) if dtype != "auto" and weight.is_floating_point() else weight.dtype
                parts = []
                for parameter, part in zip(layout.names(name), layout.split(name, weight), strict=True):
                    change = changes.get(parameter, Change())
                    if parameter in structure.quantised and change.saved is None:
                        part = _quantise_and_back(part, record, transposed=parameter in (structure.conv1d or ()))
                    parts.append(_merged_tensor(parameter, part, change, final))
                tensors[name] = layout.join(name, tuple(parts))
                done += tensors[name].nbytes
                if progress:
                    progress(done, total)
        return tensors

    with atomic_folder(target) as folder:
        check_room(folder, total)
        copy_side_files(base, folder, config, dtype=dtype, template=record.get("template", "auto"))
        if (protocol := record.get("protocol", "auto")) != "auto":  # how it was trained to call tools: chat asks for it
            write_text(folder / RECORD_FILE, json.dumps({"protocol": protocol}) + "\n")
        write_shards(folder, shards, merged)
    return Path(out)


def _merged_tensor(name: str, weight: torch.Tensor, change: Change, dtype: torch.dtype) -> torch.Tensor:
    result = weight if change.saved is None else change.saved
    if change.a is not None and change.b is not None:
        delta = (change.b.float() @ change.a.float()).mul_(change.scaling)
        result = result.float() + (delta.T if change.transposed else delta)
    if change.magnitude is not None:
        inputs = 0 if change.transposed else 1
        length = result.norm(dim=inputs, keepdim=True)
        result = result * (change.magnitude.float().unsqueeze(inputs) / length)
    if change.bias is not None:
        result = result.float() + change.bias.float() * change.scaling
    result = result.to(dtype).contiguous()
    if result is not weight and not result.isfinite().all() and weight.isfinite().all():
        raise CourseError(
            f"{name}: not finite after merging as {dtype}; the adapter is damaged, or needs dtype float32"
        )
    return result


def _quantise_and_back(weight: torch.Tensor, record: dict[str, Any], *, transposed: bool) -> torch.Tensor:
    """Return the float32 weight that a model loaded in nf4 or int8 multiplies with. `weight` is (out, in), or (in, out) if transposed.

    As transformers and bitsandbytes do on loading: cast to the compute dtype, then NF4 in blocks of 64 (Dettmers et al. 2023,
    arXiv 2305.14314), or float16 and one int8 scale a row (arXiv 2208.07339).
    """
    import torch
    from bitsandbytes import functional

    compute = record.get("compute_dtype")
    weight = weight.to(getattr(torch, compute) if compute in OUTPUT_DTYPES else torch.float32)
    weight = (weight.T if transposed else weight).contiguous()
    if record["dtype"] == "nf4":
        double = record.get("double_quant", True)
        result = functional.dequantize_4bit(
            *functional.quantize_4bit(weight, compress_statistics=double, quant_type="nf4")
        )
    else:
        packed, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        result = functional.int8_vectorwise_dequant(packed, scales)
    return (result.T if transposed else result).float()


def _check_plain_lora(lora: dict[str, Any], adapter: Path) -> None:
    kinds = [] if lora.get("peft_type") == "LORA" else [f"of type {lora.get('peft_type')}"]
    kinds += [f"LoRA with {setting}" for setting in NOT_PLAIN if lora.get(setting)]
    if lora.get("init_lora_weights", True) not in PLAIN_STARTS:
        kinds.append(f"LoRA started from {lora['init_lora_weights']}")
    if kinds:
        raise InputError(
            f"{adapter}: is {kinds[0]}, and only LoRA and DoRA are merged here; use peft's merge_and_unload"
        )


def _check_out(out: Path, inputs: list[Path], *, overwrite: bool) -> None:
    for folder in (folder.resolve() for folder in inputs):
        if out == folder or out in folder.parents or folder in out.parents:
            raise InputError(f"{out}: overlaps {folder}, which is read from; choose another output folder")
    file_to_write(out, overwrite=overwrite)
    if out.exists() and not (out / "config.json").is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: is no model folder, so it is not overwritten; choose another output folder")
