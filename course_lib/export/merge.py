"""Merging a LoRA adapter into its base model, tensor by tensor, without loading the model.

W' = W + scaling * B A (Hu et al. 2021, arXiv 2106.09685); scaling is alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732).
An adapter trained on a quantised base was fitted to the rounded weights, so W is then the quantised and dequantised weight.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from course_lib.errors import CourseError, InputError
from course_lib.files import atomic_folder, file_to_write, read_text
from course_lib.models import check_adapter, model_folder

if TYPE_CHECKING:
    import torch

OUTPUT_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # torch's name: safetensors' name
FLOAT_SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
SIZES = {**FLOAT_SIZES, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
# Files of the base that would be wrong beside the merged weights: they tell of another origin, or of an adapter to load.
NOT_COPIED = ("config.json", "source.json", "course.json", "adapter_config.json")
# Settings of peft's LoraConfig under which an adapter is more than W + scaling * B A.
NOT_PLAIN = (
    *("use_dora", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "layer_replication"),
    *("alora_invocation_tokens", "target_parameters", "trainable_token_indices"),
)
# Other starts (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base weights: such an adapter does not fit the base on disk.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


class Stored(NamedTuple):
    """One tensor of the base on disk; `dtype` is safetensors' name for it, such as BF16."""

    file: Path
    shape: list[int]
    dtype: str


class Structure(NamedTuple):
    """What only the model's code knows, as tensor names on disk."""

    tied: set[str]  # tensors that serve as embedding and as output head; those not on disk by the model's name
    conv1d: set[str] | None  # weights that are (in, out), as in GPT-2; None when not known
    quantised: set[str]  # weights that bitsandbytes quantised under the adapter


@dataclass
class Change:
    """What the adapter does to one tensor of the base."""

    a: torch.Tensor | None = None  # (r, in)
    b: torch.Tensor | None = None  # (out, r)
    scaling: float = 1.0
    transposed: bool = False  # the base's tensor is (in, out)
    bias: torch.Tensor | None = None  # lora_B's own bias, added to the layer's
    saved: torch.Tensor | None = None  # trained whole (modules_to_save, biases): takes the tensor's place


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
        InputError: the adapter is of another base or no plain LoRA; it changes a tied embedding or a tensor the base does not have;
            the base is not in safetensors or is stored quantised; `out` exists or overlaps base or adapter; a wrong option.
        CourseError: the disk is full (an older `out` is as it was), a sum is not finite in `dtype`, or fetching the base failed.
    """
    base, adapter, target = model_folder(base), Path(adapter).expanduser(), Path(out).expanduser().resolve()
    check_adapter(adapter, base)
    if dtype not in ("auto", *OUTPUT_DTYPES):
        raise InputError(f"dtype {dtype!r} is unknown: choose auto, {', '.join(OUTPUT_DTYPES)}")
    limit = _parse_size(max_shard_size)
    _check_out(target, [base, adapter], overwrite=overwrite)
    lora = _read_json(adapter / "adapter_config.json")
    _check_plain_lora(lora, adapter)
    record = _read_json(adapter / "course.json") if (adapter / "course.json").is_file() else {}
    config = _read_json(base / "config.json")
    stored = _stored_tensors(base, quantised="quantization_config" in config)
    structure = _structure(base, config, stored, record, trust_remote_code=trust_remote_code)

    import torch
    from safetensors.torch import save_file

    shards = _plan_shards(stored, dtype, limit)
    total, done, weight_map = sum(size for shard in shards for size in shard.values()), 0, {}
    with _open(
        adapter / "adapter_model.safetensors"
    ) as trained:  # its tensors stay mapped from the file while they are used
        changes = _changes(adapter, trained, lora, stored, structure)
    with atomic_folder(target) as folder:
        if shutil.disk_usage(folder).free < total:  # known sooner than after minutes of work
            raise OSError(errno.ENOSPC, "No space left on device")
        _copy_side_files(base, folder, config, dtype)
        for number, shard in enumerate(shards, start=1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors: dict[str, torch.Tensor] = {}
            # Opened anew for each shard: closing gives the mapped pages of the base back.
            with ExitStack() as stack:
                opened = {path: stack.enter_context(_open(path)) for path in {stored[name].file for name in shard}}
                for name, size in shard.items():
                    weight, change = opened[stored[name].file].get_tensor(name), changes.get(name, Change())
                    final = getattr(torch, dtype) if dtype != "auto" and weight.is_floating_point() else weight.dtype
                    if name in structure.quantised and change.saved is None:
                        weight = _quantise_and_back(weight, record, transposed=name in (structure.conv1d or ()))
                    tensors[name] = _merged_tensor(name, weight, change, final)
                    weight_map[name] = file
                    done += size
                    if progress:
                        progress(done, total)
                save_file(tensors, folder / file, metadata={"format": "pt"})
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return Path(out)


def _merged_tensor(name: str, weight: torch.Tensor, change: Change, dtype: torch.dtype) -> torch.Tensor:
    result = weight if change.saved is None else change.saved
    if change.a is not None and change.b is not None:
        delta = (change.b.float() @ change.a.float()).mul_(change.scaling)
        result = result.float() + (delta.T if change.transposed else delta)
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


def _structure(
    folder: Path, config: dict[str, Any], stored: dict[str, Stored], record: dict[str, Any], *, trust_remote_code: bool
) -> Structure:
    """Build the model without memory (torch's meta device) and look at it."""
    from transformers import CONFIG_MAPPING

    quantised, dtype = set(), record.get("dtype")
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING and not trust_remote_code:
        if dtype in ("nf4", "int8"):
            reason = f"which layers were {dtype} is known only to the model's own code in that folder"
            raise InputError(f"{folder}: {reason}; read it, then ask for it with trust_remote_code")
        heads = {name for name, tensor in stored.items() if tensor.shape[:1] == [config.get("vocab_size")]}
        return Structure(heads | {"lm_head.weight"} if config.get("tie_word_embeddings") else set(), None, set())

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.pytorch_utils import Conv1D

    from course_lib.fetch import quiet_transformers

    try:
        with quiet_transformers(), torch.device("meta"):
            settings = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            model = AutoModelForCausalLM.from_config(settings, trust_remote_code=trust_remote_code)
    except Exception as error:  # wrong fields, code of another transformers version: each raises its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder}: no causal language model can be built from its config.json ({reason})") from error
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    conv1d = {
        _disk_name(f"{name}.weight", stored) for name, module in model.named_modules() if isinstance(module, Conv1D)
    }
    if dtype in ("nf4", "int8"):
        from bitsandbytes.nn import Linear4bit
        from transformers.integrations import replace_with_bnb_linear
        from transformers.quantizers.base import HfQuantizer

        # transformers' own choice of layers, the same for 4 and 8 bits: every linear layer but the output head.
        kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        replace_with_bnb_linear(model, kept, BitsAndBytesConfig(load_in_4bit=True))
        names = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)]
        if missing := [name for name in names if _disk_name(name, stored) is None]:
            raise InputError(
                f"{folder}: {missing[0]} was {dtype} under the adapter, but the weights have no such tensor"
            )
        quantised = {_disk_name(name, stored) for name in names}
    return Structure({_disk_name(name, stored) or name for name in tied}, conv1d, quantised)


def _changes(
    adapter: Path, trained: Any, lora: dict[str, Any], stored: dict[str, Stored], structure: Structure
) -> dict[str, Change]:
    """Collect what the adapter does to each tensor of the base, by its name on disk, and check that it can. `trained` is its open file."""
    changes: dict[str, Change] = {}
    for key in trained.keys():  # noqa: SIM118 (it is no mapping)
        lora_key = re.fullmatch(r"base_model\.model\.(.+)\.lora_(embedding_)?([AB])(\.weight|\.bias)?", key)
        if lora_key:
            module, embedding, side, part = lora_key.groups()
            parameter, role = (f"{module}.bias", "bias") if part == ".bias" else (f"{module}.weight", side.lower())
        else:
            parameter, role = key.removeprefix("base_model.model.").replace(".base_layer.", "."), "saved"
        name = _disk_name(parameter, stored) or parameter
        if name in structure.tied:
            reason = f"changes {parameter}, but the model shares that tensor between its embedding and its output head"
            raise InputError(f"{adapter}: {reason}; train without it, or on a model whose embeddings are not tied")
        if name not in stored:
            raise InputError(f"{adapter}: {key} is for {parameter}, but the base has no such tensor on disk")
        change = changes.setdefault(name, Change())
        setattr(change, role, trained.get_tensor(key))
        if lora_key:
            change.scaling = _scaling(lora, module)
            # peft's flag tells of the layer that it wrapped: over a quantised Conv1D that is a plain linear one.
            conv1d = lora.get("fan_in_fan_out", False) if structure.conv1d is None else name in structure.conv1d
            change.transposed = bool(embedding) or conv1d  # an embedding is (vocabulary, width)
    for name, change in changes.items():
        _check_shapes(name, change, stored[name].shape, adapter)
    return changes


def _disk_name(parameter: str, stored: dict[str, Stored]) -> str | None:
    """Find a model's parameter on disk, where the model's own prefix ("model.", "transformer.") may be missing or added."""
    for name in (parameter, parameter.partition(".")[2]):
        if name in stored:
            return name
    longer = [name for name in stored if name.endswith(f".{parameter}")]
    return longer[0] if len(longer) == 1 else None


def _scaling(lora: dict[str, Any], module: str) -> float:
    """Return alpha / r, or alpha / sqrt(r) with rsLoRA. A pattern matches the end of a module's name, as in peft's `get_pattern_key`."""

    def setting(patterns: str, default: str) -> float:
        matching = (value for key, value in (lora.get(patterns) or {}).items() if re.match(rf"(.*\.)?({key})$", module))
        return next(matching, lora[default])

    r, alpha = setting("rank_pattern", "r"), setting("alpha_pattern", "lora_alpha")
    return alpha / (sqrt(r) if lora.get("use_rslora") else r)


def _check_shapes(name: str, change: Change, shape: list[int], adapter: Path) -> None:
    if (change.a is None) != (change.b is None):
        raise InputError(f"{adapter}: has only one of the two LoRA matrices for {name}; save the adapter again")
    found = [list(tensor.shape) for tensor in (change.saved, change.bias) if tensor is not None]
    if change.a is not None and change.b is not None:
        product = [change.b.shape[0], change.a.shape[1]] if change.b.shape[1:] == change.a.shape[:1] else []
        found.append(product[::-1] if change.transposed else product)
    if wrong := [each for each in found if each != shape]:
        reason = f"changes {name} by a tensor of shape {wrong[0]}, but the base's is {shape}"
        raise InputError(f"{adapter}: {reason}; it is of another model, or of one whose vocabulary was resized")


def _stored_tensors(folder: Path, *, quantised: bool) -> dict[str, Stored]:
    """List the tensors of a model folder without reading them, from the files that transformers would load."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    elif index.is_file():
        files = [folder / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
    elif list(folder.glob("*.bin")):
        how = "load the model with AutoModelForCausalLM.from_pretrained and save it with save_pretrained"
        raise InputError(f"{folder}: its weights are pickled .bin files; convert them to safetensors first: {how}")
    else:
        raise InputError(f"{folder}: holds neither model.safetensors nor its index; fetch or save the model again")
    stored: dict[str, Stored] = {}
    for file in files:
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                view = opened.get_slice(name)
                stored[name] = Stored(file, view.get_shape(), view.get_dtype())
                if stored[name].dtype not in (FLOAT_SIZES if quantised else SIZES):
                    kind = f"stores {name} quantised ({stored[name].dtype})"
                    raise InputError(f"{folder}: {kind}; merge into the model that it was quantised from")
    return stored


def _plan_shards(stored: dict[str, Stored], dtype: str, limit: int) -> list[dict[str, int]]:
    """Deal the tensors, in order, into shards of at most `limit` bytes; return the bytes each will have, by name."""
    shards: list[dict[str, int]] = [{}]
    for name, tensor in stored.items():
        final = OUTPUT_DTYPES.get(dtype, tensor.dtype) if tensor.dtype in FLOAT_SIZES else tensor.dtype
        size = prod(tensor.shape) * SIZES[final]
        if shards[-1] and sum(shards[-1].values()) + size > limit:
            shards.append({})
        shards[-1][name] = size
    return shards


def _copy_side_files(base: Path, folder: Path, config: dict[str, Any], dtype: str) -> None:
    """Copy what transformers reads beside the weights (tokenizer, template, generation settings, code) and the licence."""
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


def _check_plain_lora(lora: dict[str, Any], adapter: Path) -> None:
    kinds = [] if lora.get("peft_type") == "LORA" else [f"of type {lora.get('peft_type')}"]
    kinds += [f"LoRA with {setting}" for setting in NOT_PLAIN if lora.get(setting)]
    if lora.get("init_lora_weights", True) not in PLAIN_STARTS:
        kinds.append(f"LoRA started from {lora['init_lora_weights']}")
    if kinds:
        raise InputError(f"{adapter}: is {kinds[0]}, and only plain LoRA is merged here; use peft's merge_and_unload")


def _check_out(out: Path, inputs: list[Path], *, overwrite: bool) -> None:
    for folder in (folder.resolve() for folder in inputs):
        if out == folder or out in folder.parents or folder in out.parents:
            raise InputError(f"{out}: overlaps {folder}, which is read from; choose another output folder")
    file_to_write(out, overwrite=overwrite)
    if out.exists() and not (out / "config.json").is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: is no model folder, so it is not overwritten; choose another output folder")


def _parse_size(size: str | int) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|[KMG]I?)B?", str(size).strip().upper())
    number = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if number < 1:
        raise InputError(f"max_shard_size {size!r} is no size: write a number of bytes, or such as 500MB, 2GB, 2GiB")
    return number


def _open(path: Path) -> Any:
    """Open a safetensors file for reading on the CPU; a context manager."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error}); fetch or save it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: is no JSON (line {error.lineno}: {error.msg}); save or fetch it again") from error
