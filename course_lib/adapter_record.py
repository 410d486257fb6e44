"""Which base an adapter belongs to: the record beside its weights, and the check against it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from course_lib.errors import InputError
from course_lib.files import read_json
from course_lib.internlm.layout import layout_of

RECORD_FILE = "course.json"  # beside peft's files
EMBEDDING_NAMES = (
    "embed_tokens.weight",
    "tok_embeddings.weight",
    "word_embeddings.weight",
    "wte.weight",
    "embed_in.weight",
)


def read_record(adapter: str | Path) -> dict[str, Any]:
    """Return what training wrote of the base: base, base_fingerprint, dtype, double_quant, compute_dtype, template, protocol; {} for an adapter from elsewhere."""
    path = Path(adapter) / RECORD_FILE
    return read_json(path) if path.is_file() else {}


def recorded_template(adapter: str | Path | None, asked: str = "auto") -> str:
    """The template that was asked for, or for "auto" the one that an adapter was trained with; "auto" where none says one."""
    return asked if asked != "auto" or adapter is None else read_record(adapter).get("template", "auto")


def recorded_protocol(model: str, adapter: str | Path | None = None) -> str:
    """The protocol that a model or an adapter was trained with, as its record says; "auto" where none does."""
    records = [read_record(folder) for folder in (adapter, model) if folder and Path(folder).is_dir()]
    return next((record["protocol"] for record in records if record.get("protocol")), "auto")


def base_fingerprint(folder: str | Path) -> str:
    """Return 16 hex digits that identify a base model, however its weights are saved (float32, bfloat16, float16; any sharding).

    sha256 over four fields of config.json and over 16 rows, spread over the vocabulary, by 16 columns of the embedding matrix,
    rounded to bfloat16. Only these values are read. A model trained in float32 and then saved in float16 may get another one.

    Raises:
        InputError: config.json or the weights are missing, or no embedding matrix is found in them.
    """
    import torch

    folder = Path(folder)
    config = read_json(folder / "config.json")
    tensors = _tensors(folder)
    name = next((name for suffix in EMBEDDING_NAMES for name in tensors if name.endswith(suffix)), None)
    if name is None:
        raise InputError(f"{folder}: no embedding matrix in the weights (looked for {', '.join(EMBEDDING_NAMES)})")
    rows = _shape(tensors[name])[0]
    picked = [index * (rows - 1) // 15 for index in range(16)]
    sample = torch.cat([tensors[name][row : row + 1, :16] for row in picked]).to(torch.bfloat16).to(torch.float32)
    # Below 2^-14 float16 loses digits that bfloat16 keeps; 2^-13 leaves room for its rounding up.
    sample[sample.abs() < 2.0**-13] = 0.0
    fields = [config.get(key) for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")]
    return hashlib.sha256(json.dumps(fields).encode() + sample.numpy().tobytes()).hexdigest()[:16]


def check_adapter(adapter_folder: str | Path, base_folder: str | Path) -> None:
    """Check that a PEFT adapter fits a base model: by the fingerprint in its `course.json`, else by every LoRA matrix's shape.

    Raises:
        InputError: the folder or one of its files is missing or damaged, or the adapter belongs to another base.
    """
    adapter, base = Path(adapter_folder), Path(base_folder)
    if not adapter.is_dir():
        raise InputError(f"{adapter}: no such folder; name the adapter folder that the training wrote")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / file).is_file():
            raise InputError(f"{adapter}: has no {file}, so it is no PEFT adapter; name the folder a training wrote")
    adapter_config = read_json(adapter / "adapter_config.json")
    course = read_record(adapter)
    owner = course.get("base") or adapter_config.get("base_model_name_or_path") or "the base it was trained on"
    if expected := course.get("base_fingerprint"):
        if (actual := base_fingerprint(base)) != expected:
            was, now = f"{owner} ({expected})", f"{base} ({actual})"
            raise InputError(f"adapter {adapter} was trained on {was}, this is {now}; load it on that base")
        return
    shapes = {name: _shape(tensor) for name, tensor in _tensors(adapter, "adapter_model.safetensors").items()}
    transposed = bool(adapter_config.get("fan_in_fan_out"))
    check_shapes(shapes, base, transposed=transposed, adapter=adapter, remedy=f"load it on {owner}")


def check_shapes(
    lora: Mapping[str, Sequence[int]], base: Path, *, transposed: bool, adapter: Path, remedy: str
) -> None:
    """Check every LoRA matrix's shape, given by peft's key, against the weight it is for.

    `transposed`: the weights are (in, out), as GPT-2's Conv1D keeps them. `adapter` and `remedy` are for the error.

    Raises:
        InputError: the base has no such weight, or one of another shape.
    """
    config, shapes = read_json(base / "config.json"), tensor_shapes(base)
    if "lm_head.weight" not in shapes and config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = next((shape for name, shape in shapes.items() if name.endswith(EMBEDDING_NAMES)), [])
    packed = "quantization_config" in config  # then the shapes on disk are not those of the matrices
    for name, shape in lora.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(embedding_)?([AB])(\.weight)?", name)
        if not match:
            continue
        module, embedding, side = match[1], match[2], match[3]
        weight = shapes.get(f"{module}.weight")
        # A is (r, in) and B (out, r) on a weight (out, in); embeddings keep (in, out) too.
        other_way = bool(embedding) or transposed
        if weight and (packed or (shape[1] if side == "A" else shape[0]) == weight[(side == "A") != other_way]):
            continue
        found = f"but the base's weight there is {weight}" if weight else "which the base does not have"
        raise InputError(
            f"adapter {adapter} does not fit {base}: {name} {list(shape)} is for {module}, {found}; {remedy}"
        )


def tensor_shapes(folder: str | Path) -> dict[str, list[int]]:
    """Return the shape of every tensor of a model, by its name in the files and by the model's, where that is another.

    Raises:
        InputError: a file is missing or damaged, or a tensor cannot be that of such a model.
    """
    layout, shapes = layout_of(folder), {name: _shape(tensor) for name, tensor in _tensors(Path(folder)).items()}
    for stored, shape in [*shapes.items()]:
        try:
            shapes |= zip(layout.names(stored), layout.shapes(stored, shape), strict=True)
        except InputError as error:
            raise InputError(f"{folder}: {error}") from None
    return shapes


def weight_files(folder: str | Path) -> list[Path]:
    """Return a model folder's weight files: its safetensors, else its pickled `pytorch_model*.bin`.

    Raises:
        InputError: there are none.
    """
    files = sorted(Path(folder).glob("*.safetensors")) or sorted(Path(folder).glob("pytorch_model*.bin"))
    if not files:
        raise InputError(f"{folder}: holds no *.safetensors; fetch or save the model again")
    return files


def _tensors(folder: Path, file: str | None = None) -> dict[str, Any]:
    """Every tensor by name, unread: something with a shape that reads only what is sliced out of it."""
    tensors: dict[str, Any] = {}
    for path in [folder / file] if file else weight_files(folder):
        try:
            if path.suffix == ".bin":
                import torch

                tensors |= torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            else:
                from safetensors import safe_open

                opened = safe_open(path, framework="pt")
                tensors |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        except Exception as error:
            raise InputError(f"{path}: is damaged ({error}); fetch or save it again") from error
    return tensors


def _shape(tensor: Any) -> list[int]:
    return list(tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)
