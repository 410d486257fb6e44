"""A model folder as one GGUF file, for llama.cpp, Ollama and LM Studio, and an Ollama Modelfile beside it.

Tensor by tensor: memory holds one as it is stored and as it is written. Names and keys are those of llama.cpp's own
converter (https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py); the format is described in
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.data.templates import ChatTemplate, choose_template
from course_lib.errors import CourseError, InputError, did_you_mean
from course_lib.export.gguf_tokenizer import write_tokenizer
from course_lib.export.model_files import check_room
from course_lib.export.ollama import modelfile
from course_lib.export.stored import open_weights, stored_tensors
from course_lib.files import atomic_file, file_to_write, read_json
from course_lib.internlm import is_internlm
from course_lib.internlm.layout import layout_of
from course_lib.models import load_tokenizer, model_folder

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# model_type in config.json: llama.cpp's architecture
ARCHITECTURES = {
    **dict.fromkeys(("llama", "mistral", "internlm", "internlm2", "internlm3"), "llama"),
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
CHUNK = 2**22  # elements that are quantised at a time
# settings of a rotary embedding that are written, or are what llama.cpp takes where nothing is; any other is refused
ROPE_KEYS = {
    "default": {"rope_type", "rope_theta"},
    "dynamic": {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"},
    "linear": {"rope_type", "rope_theta", "factor"},
    "yarn": {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"},
    "llama3": {
        *("rope_type", "rope_theta", "factor", "original_max_position_embeddings"),
        *("low_freq_factor", "high_freq_factor"),
    },
}


@dataclass(frozen=True)
class _Planned:
    """One tensor of the file: `make` reads it, in the order of llama.cpp's rows."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    make: Callable[[], torch.Tensor]


def export_gguf(
    model: str | Path,
    out: str | Path,
    *,
    type: str = "q8_0",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a whole model to the file `out`, a Modelfile for Ollama beside it, and return `out`.

    `model` is a folder, a catalogue name or `owner/name`: a Llama, Mistral, InternLM, Qwen2 or Qwen3. Matrices are written as
    `type`: f32, f16, bf16, q8_0 (8.5 bits a weight) or q4_0 (4.5 bits; embedding and head as q8_0); a matrix whose rows are
    no multiple of 32 long stays f16 where they would be quantised. Vectors are f32, as llama.cpp wants them. Tokenizer and
    chat template come along. `progress(done, total)`, in bytes, is called after each tensor.

    Raises:
        InputError: an adapter, another architecture, a model stored quantised or incomplete, a tokenizer or rotary embedding that
            llama.cpp does not have, an unknown type, `out` exists or is no *.gguf.
        CourseError: a weight is beyond f16's range; the disk is full: nothing half-written is left.
    """
    out = _checked_out(out, overwrite=overwrite)
    if type not in TYPES:
        raise InputError(f"type {type!r} is unknown: choose {', '.join(TYPES)}{did_you_mean(type, TYPES)}")
    if (Path(model).expanduser() / "adapter_config.json").is_file():
        raise InputError(f"{model}: is an adapter; merge it first: course merge BASE {model} OUT")
    folder = model_folder(model)
    config = _config(folder)
    tokenizer = load_tokenizer(folder)
    template = choose_template(tokenizer) if tokenizer.chat_template else None
    planned = _plan(folder, config, type)

    import gguf

    with atomic_file(out) as temporary, atomic_file(out.with_suffix(".Modelfile")) as beside:
        beside.write_text(modelfile(out.name, tokenizer, template), encoding="utf-8")
        writer = gguf.GGUFWriter(temporary, _architecture(config))
        try:
            _write_metadata(writer, config, tokenizer, template, type, name=folder.resolve().name)
            for tensor in planned:
                dtype, shape = _array(tensor)
                writer.add_tensor_info(tensor.name, shape, dtype, prod(shape) * dtype.itemsize, raw_dtype=tensor.type)
            total = sum(prod(shape) * dtype.itemsize for dtype, shape in map(_array, planned))
            check_room(temporary.parent, total)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            done = 0
            for tensor in planned:
                written = _encoded(tensor)
                writer.write_tensor_data(written)
                done += written.nbytes
                if progress:
                    progress(done, total)
        finally:
            writer.close()
    return out


def _checked_out(out: str | Path, *, overwrite: bool) -> Path:
    out = Path(out).expanduser()
    if out.suffix != ".gguf":
        example = out / "model.gguf" if out.is_dir() or not out.suffix else out.with_suffix(".gguf")
        raise InputError(f"{out}: is no name of a GGUF file; name one such as {example}")
    file_to_write(out, overwrite=overwrite)
    file_to_write(out.with_suffix(".Modelfile"), overwrite=overwrite)
    return out


def _config(folder: Path) -> PretrainedConfig:
    """The model's settings as transformers reads them.

    Raises:
        InputError: llama.cpp would compute something else by them.
    """
    from transformers import AutoConfig

    raw = read_json(folder / "config.json")
    kind = raw.get("model_type")
    if kind not in ARCHITECTURES:
        raise InputError(f"{folder}: is a {kind}; only {', '.join(ARCHITECTURES)} go into a GGUF file here")
    if "quantization_config" in raw:
        raise InputError(f"{folder}: is stored quantised; export the model that it was quantised from")
    if is_internlm(raw):
        from course_lib.internlm.model import register

        register()
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise InputError(f"{folder}: its config.json is not understood ({str(error).splitlines()[0]})") from error
    refused = []
    if config.hidden_act != "silu":
        refused.append(f"hidden_act {config.hidden_act!r}")
    if kind == "qwen3" and config.attention_bias:
        refused.append("attention_bias")
    rope = config.rope_parameters
    known = {*ROPE_KEYS.get(rope.get("rope_type", ""), ()), "type"}  # the older name of rope_type
    refused += [
        f"{key} {value!r} of the rotary embedding"
        for key, value in rope.items()
        if key not in known and value is not None
    ]
    if refused:
        raise InputError(
            f"{folder}: {refused[0]} is not in llama.cpp's {ARCHITECTURES[kind]}, so it cannot be exported"
        )
    return config


def _architecture(config: PretrainedConfig) -> str:
    return ARCHITECTURES[getattr(config, "checkpoint_type", "") or config.model_type]


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _write_metadata(
    writer: GGUFWriter,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
    type: str,
    *,
    name: str,
) -> None:
    import gguf

    window = getattr(config, "sliding_window", None)  # unlimited in llama.cpp: the same up to that many tokens
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type({**{t: gguf.LlamaFileType[f"MOSTLY_{t.upper()}"] for t in TYPES[1:]}, "f32": 0}[type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
    write_tokenizer(writer, tokenizer, template, config.vocab_size)


def _plan(folder: Path, config: PretrainedConfig, type: str) -> list[_Planned]:
    """Every tensor that the file will hold, none read yet.

    Raises:
        InputError: the folder lacks one, or has it in another shape.
    """
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        parameters = dict(AutoModelForCausalLM.from_config(config).named_parameters())  # a tied head is not among them
    stored, layout = stored_tensors(folder, quantised=False), layout_of(folder)
    found = {parameter: (name, part) for name in stored for part, parameter in enumerate(layout.names(name))}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[_architecture(config).upper()], config.num_hidden_layers)
    planned = []
    for parameter, expected in parameters.items():
        if parameter not in found:
            missing = layout.stored_name(parameter)
            raise InputError(
                f"{folder}: tensor {missing} is missing; the folder is incomplete: fetch or merge it again"
            )
        name, part = found[parameter]
        shape = layout.shapes(name, stored[name].shape)[part]
        if shape != list(expected.shape):
            raise InputError(
                f"{folder}: tensor {name} is {shape}, and by config.json {list(expected.shape)}; fetch or merge it again"
            )
        written = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        assert written is not None, parameter
        make = _reader(stored[name].file, name, part, layout, heads=_turned_heads(parameter, config))
        planned.append(_Planned(written, tuple(shape), _type_of(written, shape, type), make))
    if config.rope_parameters["rope_type"] == "llama3":
        factors = _llama3_factors(config)
        planned.append(_Planned("rope_freqs.weight", (len(factors),), gguf.GGMLQuantizationType.F32, lambda: factors))
    return planned


def _reader(file: Path, name: str, part: int, layout: Any, *, heads: int) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        with open_weights(file) as opened:
            tensor = layout.split(name, opened.get_tensor(name))[part]
        if heads:  # pairs of a head's rows that turn together: halves apart in transformers, neighbours in llama.cpp
            return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        return tensor

    return read


def _turned_heads(parameter: str, config: PretrainedConfig) -> int:
    """How many heads' rows are interleaved in llama.cpp; 0 where they are not."""
    if _architecture(config) != "llama":
        return 0
    module = parameter.rsplit(".", 2)[-2]
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module, 0)


def _type_of(name: str, shape: list[int], type: str) -> GGMLQuantizationType:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1:
        return GGMLQuantizationType.F32
    wanted = GGMLQuantizationType[type.upper()]
    if type == "q4_0" and name in ("token_embd.weight", "output.weight"):
        wanted = GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.F16 if shape[-1] % GGML_QUANT_SIZES[wanted][0] else wanted


def _array(tensor: _Planned) -> tuple[np.dtype, tuple[int, ...]]:
    """dtype and shape of the array that holds a tensor as it is written; blocks are bytes."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    floats = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    if tensor.type in floats:
        return np.dtype(floats[tensor.type]), tensor.shape
    return np.dtype(np.uint8), quant_shape_to_byte_shape(tensor.shape, tensor.type)


def _encoded(tensor: _Planned) -> np.ndarray:
    """Read a tensor and encode it, some rows at a time."""
    import numpy as np
    from gguf import quantize

    dtype, shape = _array(tensor)
    result, values = np.empty(shape, dtype), tensor.make()
    for rows in _row_slices(tensor.shape):
        chunk = values[rows].float().numpy()
        with np.errstate(over="ignore"):
            result[rows] = quantize(np.ascontiguousarray(chunk), tensor.type)
        if dtype == np.float16 and not np.isfinite(result[rows]).all():
            largest = float(np.abs(chunk).max())
            raise CourseError(
                f"{tensor.name}: holds {largest:.6g}, beyond float16's {np.finfo(np.float16).max}; export it as bf16 or f32"
            )
    return result


def _row_slices(shape: tuple[int, ...]) -> Iterator[slice]:
    step = max(1, CHUNK // prod(shape[1:]))
    return (slice(start, start + step) for start in range(0, shape[0], step))


def _llama3_factors(config: PretrainedConfig) -> torch.Tensor:
    """What llama.cpp divides each rotation's frequency by, for a rotary embedding of Llama 3.1's type: (head_dim / 2,).

    As `_compute_llama3_parameters` in transformers' modeling_rope_utils.py: long waves are stretched by `factor`, short ones kept,
    those between blended.
    """
    import torch

    rope, head_dim = config.rope_parameters, _head_dim(config)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    original = rope["original_max_position_embeddings"]
    factors = []
    for pair in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (pair / head_dim)
        smooth = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors)
