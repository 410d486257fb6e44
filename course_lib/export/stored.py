"""The tensors of a model folder as they lie in its files, safetensors or pickled, each read only when it is asked for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from course_lib.errors import InputError
from course_lib.files import read_json

if TYPE_CHECKING:
    import torch

FLOAT_SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
SIZES = {**FLOAT_SIZES, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
# torch's name: safetensors' name
DTYPES = {
    **{"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"},
}


class Stored(NamedTuple):
    """One tensor of the base on disk; `dtype` is safetensors' name for it, such as BF16."""

    file: Path
    shape: list[int]
    dtype: str


def stored_tensors(folder: Path, *, quantised: bool) -> dict[str, Stored]:
    """List the tensors of a model folder without reading them, from the files that transformers would load.

    Raises:
        InputError: there are none, one is damaged, or some are stored quantised (`quantised`: the config says so).
    """
    stored: dict[str, Stored] = {}
    for file in _loaded_files(folder):
        with open_weights(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                view = opened.get_slice(name)
                stored[name] = Stored(file, view.get_shape(), view.get_dtype())
                if stored[name].dtype not in (FLOAT_SIZES if quantised else SIZES):
                    kind = f"stores {name} quantised ({stored[name].dtype})"
                    raise InputError(f"{folder}: {kind}; merge into the model that it was quantised from")
    return stored


def _loaded_files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        file, index = folder / name, folder / f"{name}.index.json"
        if file.is_file():
            return [file]
        if index.is_file():
            return [folder / shard for shard in sorted(set(read_json(index).get("weight_map", {}).values()))]
    raise InputError(
        f"{folder}: holds neither model.safetensors nor pytorch_model.bin, nor an index of either; fetch or save the model again"
    )


def open_weights(path: Path) -> Any:
    """Open a file of weights for reading on the CPU: safetensors' context manager, or for a .bin its like."""
    return PickledWeights(path) if path.suffix == ".bin" else open_safetensors(path)


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file for reading on the CPU; a context manager."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error}); fetch or save it again") from error


class PickledWeights:
    """A pickled state dict, mapped from its file, in the form of an open safetensors file. Nothing but tensors is unpickled."""

    def __init__(self, path: Path) -> None:
        import torch

        try:
            self._tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # a torn archive, a pickle of other things than tensors: each raises its own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"{path}: cannot be read as pickled weights ({reason}); fetch or save it again") from error

    def __enter__(self) -> PickledWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors = {}

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._tensors)

    def get_tensor(self, name: str) -> torch.Tensor:
        """Return a tensor of its own: tied ones share their memory in the file."""
        return self._tensors[name].clone()

    def get_slice(self, name: str) -> SimpleNamespace:
        """Return what tells a tensor's shape and type without reading it."""
        tensor = self._tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        return SimpleNamespace(get_shape=lambda: list(tensor.shape), get_dtype=lambda: DTYPES.get(dtype, dtype))
