"""Reading what `torch.save` wrote without running anything that is in it.

A pickle names functions and has them called, so whoever made the file decides what runs. Here a name is never looked up. A handful
of them, of which tensors and ordered dicts are made, mean something of ours; every other one becomes a placeholder that takes any call
and does nothing. So an optimizer's state, mmengine's log buffers and DeepSpeed's enums may stand in a file, and so may an attack.

Format: a zip archive, nothing compressed. `NAME/data.pkl` is the pickle; where it has a tensor, a persistent id
("storage", type, key, device, elements) stands for the bytes in `NAME/data/KEY`
(https://docs.pytorch.org/docs/stable/notes/serialization.html). `torch.load(weights_only=True)` reads no file that holds anything else.
"""

from __future__ import annotations

import io
import mmap
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from course_lib.errors import InputError

if TYPE_CHECKING:
    import torch

STORAGES = {
    **{"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16"},
    **{"LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8"},
    **{"ByteStorage": "uint8", "BoolStorage": "bool"},
}
LOCAL_HEADER_BYTES = 30  # of a file in a zip archive, before its name; the lengths of name and extra field end it


class LazyTensor(Protocol):
    """A tensor on disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, known without reading it."""

    def read(self) -> torch.Tensor:
        """The tensor. It may be a view of the file: copy what is to be kept or changed."""


def load_restricted(path: Path) -> Any:
    """Read a file of `torch.save`: plain containers, numbers and texts, with a `PickledTensor` where a tensor is.

    Whatever else it holds is an `Inert`.

    Raises:
        InputError: the file is missing, cut short or otherwise damaged, older than PyTorch 1.6's format, or no file of `torch.save`.
    """
    archive = _Archive(path)
    try:
        return _Unpickler(io.BytesIO(archive.pickle), archive).load()
    except InputError:
        raise
    except Exception as error:  # a pickle can be wrong in any way, and so can what it asks for
        raise InputError(
            f"{path}: is no checkpoint that can be read ({_reason(error)}); save or copy it again"
        ) from error


class Inert:
    """In the place of an object of a class that is not built here. Whatever it is asked to do has no effect.

    Attributes:
        arguments: what it would have been made from, such as (2,) of an enum's member.
    """

    arguments: tuple[Any, ...]

    def __new__(cls, *arguments: Any, **_: Any) -> Inert:
        inert = super().__new__(cls)
        inert.arguments = arguments
        return inert

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take any arguments."""

    def ignore(self, *_: Any) -> None:
        """What a pickle fills an object with goes nowhere."""

    __setstate__ = __setitem__ = append = extend = add = ignore


class _Dict(dict):
    """An OrderedDict, whose attributes (a state dict has `_metadata`) are left out."""

    def __setstate__(self, _: Any) -> None:
        pass


class _Sealed:
    """What a pickle can have made for it, and cannot change."""

    def __setstate__(self, _: Any) -> NoReturn:
        raise pickle.UnpicklingError(f"{type(self).__name__} is changed after it was made")


@dataclass(frozen=True)
class PickledTensor(_Sealed):
    """A tensor in a file of `torch.save`."""

    archive: _Archive
    dtype: str  # torch's name
    key: str
    elements: int  # of the storage, which several tensors may share
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """The tensor, a view of the mapped file.

        Raises:
            InputError: it is larger than the bytes stored for it.
        """
        last = self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        # one whose elements are one and the same would be small here, and could be larger than memory when copied
        if prod(self.shape) > self.elements or (prod(self.shape) and last >= self.elements):
            raise InputError(
                f"{self.archive.path}: a tensor of shape {self.shape} does not fit into the {self.elements} elements stored for "
                "it; save or copy the file again"
            )
        values = self.archive.values(self.key, self.dtype, self.elements)
        return values.as_strided(self.shape, self.stride, self.offset)


@dataclass(frozen=True)
class _Dtype(_Sealed):
    name: str  # torch's


@dataclass(frozen=True)
class _Storage(_Sealed):
    dtype: str
    key: str
    elements: int


@dataclass(frozen=True)
class _Function(_Sealed):
    """Something of ours that a pickle may call."""

    call: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)


class _Unpickler(pickle.Unpickler):
    """Builds plain containers and `PickledTensor`s."""

    def __init__(self, file: io.BytesIO, archive: _Archive) -> None:
        super().__init__(file, encoding="utf-8")
        self._archive = archive
        tensor, first = _Function(self._tensor), _Function(lambda value, *_: value)
        self._known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): _Function(_Dict),
            ("torch", "Size"): _Function(tuple),
            ("torch._utils", "_rebuild_tensor"): tensor,
            ("torch._utils", "_rebuild_tensor_v2"): tensor,
            ("torch._utils", "_rebuild_parameter"): first,
            ("torch._utils", "_rebuild_parameter_with_state"): first,
            # a tensor with attributes of its own, or of a subclass: (function, class, its arguments, attributes)
            ("torch._tensor", "_rebuild_from_type_v2"): _Function(lambda _, __, arguments, *___: tensor(*arguments)),
            **{("torch", storage): _Dtype(name) for storage, name in STORAGES.items()},
        }

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the pickle stands for. Nothing is imported."""
        return self._known.get((module, name), Inert)

    def persistent_load(self, identifier: Any) -> _Storage:
        """A tensor's storage."""
        match identifier:
            case ("storage", _Dtype(dtype), str(key), _, int(elements)):
                return _Storage(dtype, key, elements)
        raise pickle.UnpicklingError("a storage of an unknown kind")

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> PickledTensor | Inert:
        if not isinstance(storage, _Storage) or type(shape) is not tuple or type(stride) is not tuple:
            return Inert()
        numbers = (offset, *shape, *stride)
        if len(shape) != len(stride) or not all(type(number) is int and number >= 0 for number in numbers):
            return Inert()
        return PickledTensor(self._archive, storage.dtype, storage.key, storage.elements, offset, shape, stride)


class _Archive:
    """The zip archive: its pickle, and the bytes of its storages, mapped from the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                if file.read(2) != b"PK":
                    self._refuse("is no file that torch.save of PyTorch 1.6 or later writes", "save it with such a one")
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            with zipfile.ZipFile(path) as opened:
                self._entries = {entry.filename: entry for entry in opened.infolist()}
                self._folder = self._find_folder()
                order = f"{self._folder}byteorder"
                if order in self._entries and opened.read(order) != b"little":
                    self._refuse("was saved by a big-endian machine", "save it on another")
                self.pickle = opened.read(f"{self._folder}data.pkl")
        except FileNotFoundError:
            raise InputError(f"{path}: no such file (looked in {Path.cwd()}); check the path") from None
        except InputError:
            raise
        except Exception as error:  # zipfile has one of its own, and lets others through
            raise InputError(
                f"{path}: is damaged or was not copied whole ({_reason(error)}); save or copy it again"
            ) from error

    def _find_folder(self) -> str:
        """The folder in the archive, with its slash."""
        pickles = [name for name in self._entries if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            self._refuse(
                f"is a zip archive with {len(pickles)} data.pkl, and torch.save writes one", "name another file"
            )
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}constants.pkl" in self._entries:
            self._refuse("is a TorchScript program, no checkpoint", "name another file")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in self._entries.values()):
            self._refuse("is compressed, which torch.save never does", "save it again")
        return folder

    def values(self, key: str, dtype: str, elements: int) -> torch.Tensor:
        """A storage as a tensor of one dimension, mapped from the file.

        Raises:
            InputError: the file holds fewer bytes of it.
        """
        import torch

        kind = getattr(torch, dtype)
        if not elements:
            return torch.empty(0, dtype=kind)
        entry = self._entries.get(f"{self._folder}data/{key}")
        if entry is None:
            self._refuse(f"has no data/{key}, which a tensor is in", "save or copy it again")
        header = self._bytes[entry.header_offset : entry.header_offset + LOCAL_HEADER_BYTES]
        start = entry.header_offset + LOCAL_HEADER_BYTES
        start += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        size = elements * kind.itemsize
        if not header.startswith(b"PK\3\4") or size > entry.file_size or start + size > len(self._bytes):
            self._refuse(f"holds fewer than the {size} bytes of data/{key}", "save or copy it again")
        return torch.frombuffer(self._bytes, dtype=kind, count=elements, offset=start)

    def _refuse(self, reason: str, remedy: str) -> NoReturn:
        raise InputError(f"{self.path}: {reason}; {remedy}")


def _reason(error: Exception) -> str:
    return " ".join((str(error).strip() or type(error).__name__).split())[:160]
