"""Reading text with errors that help, and writes that leave the old file whole when they fail.

A write goes to a temporary name beside its target and is renamed over it only when complete, so an interrupted run or a full
disk never destroys what was there.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from course_lib.errors import CourseError, InputError


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file (a byte-order mark is accepted).

    Raises:
        InputError: the file is missing, a folder, unreadable, empty, or not UTF-8 (line and column of the first bad byte).
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file (looked in {Path.cwd()}); check the path") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; name a file inside it") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    text = decode_text(raw, path)
    if not text.strip():
        raise InputError(f"{path}: is empty")
    return text


def decode_text(raw: bytes, path: Path, *, first_line: int = 1) -> str:
    """Decode UTF-8 that begins at line `first_line` of `path` (a byte-order mark at the file's start is left off).

    Raises:
        InputError: it is UTF-16, holds NUL bytes, or is not UTF-8 (line and column of the first bad byte).
    """
    to_utf8 = f"-t utf-8 {path.name} > {path.stem}-utf8{path.suffix}"
    if first_line == 1 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path}: is UTF-16 text; convert it: iconv -f utf-16 {to_utf8}")
    if b"\0" in raw:
        if first_line == 1 and len(raw) > 1 and (raw[0] == 0) != (raw[1] == 0):  # ASCII in UTF-16, unmarked
            kind = "utf-16be" if raw[0] == 0 else "utf-16le"
            raise InputError(f"{path}: is UTF-16 text; convert it: iconv -f {kind} {to_utf8}")
        line = first_line + raw.count(b"\n", 0, raw.index(b"\0"))
        raise InputError(f"{path}: holds NUL bytes at line {line}, so it is no text, or was not copied whole")
    try:
        return raw.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        # counted in `error.object`: the decoder leaves a byte-order mark off it
        before, bad = error.object[: error.start], error.object[error.start]
        line = first_line + before.count(b"\n")
        column = error.start - (before.rfind(b"\n") + 1) + 1
        raise InputError(
            f"{path}: not UTF-8: byte 0x{bad:02X} at line {line}, column {column}; "
            f"if it is latin-1, convert it: iconv -f latin1 {to_utf8}"
        ) from None


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds an object, such as a model's config.json.

    Raises:
        InputError: as `read_text`; or the file is no JSON (line), or holds something else.
    """
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: is no JSON (line {error.lineno}: {error.msg}); save or fetch it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds {type(value).__name__}, not an object; save or fetch it again")
    return value


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to `path` when the block ends well.

    Raises:
        CourseError: the disk is full or the folder cannot be written; `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with save_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # a place where nothing can be removed is one where nothing was written
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new empty folder; when the block ends well it takes the place of `path`.

    Raises:
        CourseError: the disk is full or the folder cannot be written; `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with save_errors(path):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            _permit_as_umask(temporary)
            take_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def take_place(new: Path, path: Path) -> None:
    """Rename the file or folder `new` to `path`; what stood there goes only when the new one stands.

    A folder cannot be renamed over another, so an old one is first moved aside: between the two
    renames the old content stands under `.NAME.PID.old`.
    """
    if not path.is_dir():
        os.replace(new, path)
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.rename(path, old)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep `folder` for this process, by a lock on its file `.lock`; the folder is made where it is missing.

    The system frees the lock when the process ends, however it ends: a file left behind blocks nobody.

    Raises:
        InputError: another process holds it, or the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    with save_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held = FileLock(folder / ".lock").acquire(blocking=False)
        except Timeout:
            raise InputError(
                f"{folder}: another run is at work here; wait until it has ended, or name another folder"
            ) from None
    with held:
        yield


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def file_to_write(path: str | Path, *, overwrite: bool) -> Path:
    """Return `path` if it may be written; refuse to replace what stands there unless asked.

    Raises:
        InputError: something stands at `path` and `overwrite` is false.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path}: already exists; choose another name or move it away")
    return path


@contextmanager
def save_errors(path: Path) -> Iterator[None]:
    """Turn the ways a save to `path` can fail into one clear line."""
    try:
        yield
    except CourseError:
        raise
    except Exception as error:
        number = _system_error(error)
        if number is None:
            raise
        free = shutil.disk_usage(_existing(path)).free
        if number in (errno.ENOSPC, errno.EDQUOT) or (number == errno.EIO and free < _FULL_BELOW_BYTES):
            raise CourseError(
                f"{path}: the disk is full, or your quota is ({free / 1e6:.0f} MB free), and the file was not written; "
                "what was there before is unchanged; free some space and run the same command again"
            ) from error
        named = getattr(error, "filename", None)
        reason = os.strerror(number) + (f": {named}" if named else "")
        if number in WRONG_PLACE:
            raise InputError(f"{path}: cannot be written ({reason}); choose another place") from error
        raise CourseError(f"{path}: was not written ({reason}); what was there before is unchanged") from error


_FULL_BELOW_BYTES = 1_000_000
# where the path is at fault, and not the disk
WRONG_PLACE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EBUSY, errno.EXDEV, errno.ENOSYS, errno.ENOTSUP),
}


def _system_error(error: Exception) -> int | None:
    """The system's number of what went wrong; None where the error is of another kind.

    safetensors and tokenizers put it into the text of errors of their own. torch.save says that fewer bytes arrived than were
    sent, and never why: an input/output error.
    """
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    text = str(error)
    if match := re.search(r"os error (\d+)", text):
        return int(match[1])
    return errno.EIO if isinstance(error, RuntimeError) and "inline_container" in text else None


def _permit_as_umask(folder: Path) -> None:
    """Let others read what they may: safetensors makes its files readable to their owner alone, whatever the umask says."""
    permitted = folder.stat().st_mode & 0o666  # the folder itself was made by the umask
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(file.stat().st_mode | permitted)


def _existing(path: Path) -> Path:
    while not os.path.exists(path):  # noqa: PTH110 (Path.exists raises for a name that is too long)
        path = path.parent
    return path
