"""Reading text with errors that help, and writes that leave the old file whole when they fail.

A write goes to a temporary name beside its target and is renamed over it only when complete
(DESIGN invariant 9), so an interrupted run or a full disk never destroys what was there.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line = before.count(b"\n") + 1
        column = error.start - (before.rfind(b"\n") + 1) + 1
        bad = raw[error.start]
        raise InputError(
            f"{path}: not UTF-8: byte 0x{bad:02X} at line {line}, column {column}; "
            f"if it is latin-1, convert it: iconv -f latin1 -t utf-8 {path.name} > {path.stem}-utf8{path.suffix}"
        ) from None
    if not text.strip():
        raise InputError(f"{path}: is empty; it should hold at least one row")
    return text


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
    with _save_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new empty folder; when the block ends well it takes the place of `path`.

    A folder cannot be renamed over another, so an old one is first moved aside: between the two
    renames the old content stands under `.NAME.PID.old`.

    Raises:
        CourseError: the disk is full or the folder cannot be written; `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    with _save_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            if path.exists():
                os.rename(path, old)
            try:
                os.rename(temporary, path)
            except OSError:
                if old.exists():
                    os.rename(old, path)
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


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
def _save_errors(path: Path) -> Iterator[None]:
    """Turn the ways a save can fail into one clear line. safetensors reports a full disk as its own error type."""
    try:
        yield
    except Exception as error:
        if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(error):
            free = shutil.disk_usage(_existing(path)).free / 1e6
            raise CourseError(
                f"{path}: the disk is full ({free:.0f} MB free) and the file was not written; "
                "what was there before is unchanged; free some space and run the same command again"
            ) from error
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
            raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
        raise


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
