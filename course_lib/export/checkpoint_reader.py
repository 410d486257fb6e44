"""The weights that a training left behind, whatever program wrote them: XTuner, DeepSpeed, peft or this library."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.adapter_record import read_record
from course_lib.errors import InputError
from course_lib.export.restricted_load import LazyTensor, PickledTensor, load_restricted
from course_lib.export.stored import open_safetensors
from course_lib.export.xtuner_config import XTunerConfig, parse_config
from course_lib.export.zero_shards import MODEL_FILE, OPTIMIZER_FILE, read_zero, zero_folder
from course_lib.files import read_json
from course_lib.training.zero import FOLDER as OWN_SHARDS

if TYPE_CHECKING:
    import torch

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")  # the second by peft before 0.7


@dataclass(frozen=True)
class TrainedWeights:
    """What a checkpoint holds, as far as it goes into a model or an adapter.

    Attributes:
        tensors: by the names the training program gave them.
        others: what DeepSpeed saved beside what it trained; empty where the two cannot be told apart.
        all_trained: whether all of `tensors` were trained.
        settings: peft's adapter_config.json, where there is one.
        record: the adapter's course.json (adapter_record.py), where there is one.
    """

    tensors: dict[str, LazyTensor]
    others: dict[str, LazyTensor] = field(default_factory=dict)
    all_trained: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    config: XTunerConfig = field(default_factory=XTunerConfig)


@dataclass(frozen=True)
class _SafeTensor:
    file: Path
    name: str
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        with open_safetensors(self.file) as opened:
            return opened.get_tensor(self.name)


def read_checkpoint(path: Path) -> TrainedWeights:
    """Find the weights in a file of torch.save, such as XTuner's `epoch_1.pth`, or in a folder.

    A folder holds DeepSpeed's shards (itself, or where `latest` in it or in its `deepspeed` says), a peft adapter, or a model in
    safetensors. Shards go before an adapter beside them, whose settings they take.

    Raises:
        InputError: there is nothing there, or nothing of that kind, or it is damaged.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder (looked in {Path.cwd()}); check the path")
    return _from_folder(path) if path.is_dir() else _from_file(path)


def _from_file(path: Path) -> TrainedWeights:
    if OPTIMIZER_FILE.fullmatch(path.name) or MODEL_FILE.fullmatch(path.name) or path.suffix == ".safetensors":
        raise InputError(f"{path}: is one file of several; name the folder it is in, {path.parent}")
    content = load_restricted(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    meta = content.get("meta") if isinstance(content, dict) else None
    return TrainedWeights(_named_tensors(state, path), config=_config(meta))


def _from_folder(folder: Path) -> TrainedWeights:
    config, record = folder / "adapter_config.json", read_record(folder)
    settings = read_json(config) if config.is_file() else {}
    shards = zero_folder(folder)
    if shards is None and (folder / OWN_SHARDS).is_dir():
        shards = zero_folder(folder / OWN_SHARDS)
    if shards:
        zero = read_zero(shards)
        tuned = _config(zero.saved_beside.get("meta"))
        return TrainedWeights(zero.trained, zero.frozen, True, settings, record, tuned)
    adapter = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    if adapter:
        if not settings:
            raise InputError(f"{adapter}: has no adapter_config.json beside it; copy the whole folder")
        return TrainedWeights(_tensors_in(adapter), {}, True, settings, record)
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise InputError(f"{folder}: {_what_is_there(folder)}")
    tensors = {name: tensor for file in files for name, tensor in _tensors_in(file).items()}
    return TrainedWeights(tensors, record=record)


def _tensors_in(file: Path) -> dict[str, LazyTensor]:
    if file.suffix == ".bin":
        return _named_tensors(load_restricted(file), file)
    with open_safetensors(file) as opened:
        return {
            name: _SafeTensor(file, name, tuple(opened.get_slice(name).get_shape()))
            for name in opened.keys()  # noqa: SIM118 (it is no mapping)
        }


def _named_tensors(state: Any, path: Path) -> dict[str, LazyTensor]:
    items = state.items() if isinstance(state, dict) else ()
    tensors = {name: value for name, value in items if isinstance(name, str) and isinstance(value, PickledTensor)}
    if not tensors:
        keys = ", ".join(sorted(name for name, _ in items if isinstance(name, str))[:8]) or "no names"
        raise InputError(f"{path}: holds no weights of a model (but {keys}); name a checkpoint")
    return tensors


def _config(meta: Any) -> XTunerConfig:
    return parse_config(meta.get("cfg") if isinstance(meta, dict) else None)


def _what_is_there(folder: Path) -> str:
    inside = [
        path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+|(epoch|iter)_\d+\.pth|adapter", path.name)
    ]
    if inside:
        newest = max(inside, key=lambda path: path.stat().st_mtime)
        return f"is no checkpoint, but holds {len(inside)}; name one of them, such as {newest}"
    return "holds no checkpoint: neither DeepSpeed's *_optim_states.pt, nor a peft adapter, nor a model"
