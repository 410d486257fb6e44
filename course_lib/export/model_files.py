"""The files of a model folder as they are written: shards with their index, and what stands beside the weights."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.data.templates import named_template
from course_lib.export.stored import FLOAT_SIZES, SIZES, Stored

if TYPE_CHECKING:
    import torch

OUTPUT_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # torch's name: safetensors' name
COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
# Files of the base that would be wrong beside other weights: they tell of another origin, or of an adapter to load.
NOT_COPIED = ("config.json", "source.json", "course.json", "adapter_config.json")


def plan_shards(stored: dict[str, Stored], dtype: str, limit: int) -> list[dict[str, int]]:
    """Deal the tensors, in order, into shards of at most `limit` bytes; return the bytes each will have, by name."""
    shards: list[dict[str, int]] = [{}]
    for name, tensor in stored.items():
        final = OUTPUT_DTYPES.get(dtype, tensor.dtype) if tensor.dtype in FLOAT_SIZES else tensor.dtype
        size = prod(tensor.shape) * SIZES[final]
        if shards[-1] and sum(shards[-1].values()) + size > limit:
            shards.append({})
        shards[-1][name] = size
    return shards


def write_shards(
    folder: Path, shards: list[dict[str, int]], tensors_of: Callable[[list[str]], dict[str, torch.Tensor]]
) -> None:
    """Write what `plan_shards` planned, and where there are several files their index. `tensors_of` makes one shard's tensors."""
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors_of(list(shard)), folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes(shards)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def total_bytes(shards: list[dict[str, int]]) -> int:
    """Bytes of all tensors."""
    return sum(size for shard in shards for size in shard.values())


def check_room(folder: Path, size: int) -> None:
    """See that the disk has room for `size` bytes: known sooner than after minutes of work.

    Raises:
        OSError: it has not; `files.atomic_folder` makes it a CourseError.
    """
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, "No space left on device")


def copy_side_files(
    base: Path, folder: Path, config: dict[str, Any], *, dtype: str = "auto", template: str = "auto"
) -> None:
    """Copy what transformers reads beside the weights (tokenizer, template, generation settings, code) and the licence.

    `dtype` is what config.json is to say. A named `template` takes the place of the model's own: whoever serves a model that was
    trained with it must use the same.
    """
    for file in sorted(base.iterdir()):
        wanted = file.suffix in COPIED_SUFFIXES or file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        if file.is_file() and wanted and file.name not in NOT_COPIED and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    if (base / "additional_chat_templates").is_dir():
        shutil.copytree(base / "additional_chat_templates", folder / "additional_chat_templates")
    merged = {key: value for key, value in config.items() if key != "quantization_config"}
    if dtype != "auto":
        merged.pop("torch_dtype", None)  # the name before transformers 5
        merged["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(merged, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if template != "auto":
        (folder / "chat_template.jinja").write_text(named_template(template).source, encoding="utf-8")
