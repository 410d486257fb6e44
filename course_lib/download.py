"""One file over HTTP: resumed where it broke off, retried, checked, and renamed into place only when whole.

Beside the target stand `NAME.part` (the bytes so far) and `NAME.part.etag` (which version of the file they
belong to), so that a later call, in another process too, goes on where this one stopped.
Range requests and their traps: RFC 9110, sections 13.1.5 (If-Range), 14.2 (Range) and 15.5.17 (416).
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from course_lib.errors import CourseError, InputError

if TYPE_CHECKING:
    import httpx2
    from rich.progress import Progress

ATTEMPTS = 5
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 60.0
CONNECT_SECONDS = 15.0
READ_SECONDS = 60.0
RETRIED_STATUS = {408, 429, 500, 502, 503, 504}


class _TryAgainError(Exception):
    """This attempt failed but the next may not; `wait` is the server's Retry-After in seconds, if it sent one."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def download(
    url: str, path: str | Path, *, sha256: str | None = None, attempts: int = ATTEMPTS, progress: bool = True
) -> Path:
    """Download `url` (http, https or file) to `path` and return `path`.

    A file at `path` that already has the given `sha256` is left alone; any other is replaced, and only when the new one is whole.
    `sha256` is 64 hex digits. `attempts` is the number of failures in a row, without one new byte, that end it. `progress` draws a bar on stderr when stderr is a terminal.

    Raises:
        CourseError: the server refuses, breaks off too often, or serves a file with another hash; the disk is full.
            The `.part` is kept for the next call, except after a wrong hash.
        InputError: the address is no http, https or file URL, names a missing file, or `path` cannot be written.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    if sha256 and path.is_file() and file_sha256(path) == sha256.lower():
        return path
    scheme = urlsplit(url).scheme.lower()
    if scheme not in {"http", "https", "file"}:
        raise InputError(f"{url}: not an address to download from; it should start with https://, http:// or file://")
    with _write_errors(path), _bar(path.name, progress) as bar:
        path.parent.mkdir(parents=True, exist_ok=True)
        resumed = (
            _copy(url, part)
            if scheme == "file"
            else _download_part(url, part, bar, attempts, check_later=sha256 is not None)
        )
        actual = file_sha256(part) if sha256 else None
        if sha256 and resumed and actual != sha256.lower():
            # The old bytes may be of another file: one whole download before the server is blamed.
            _discard(part)
            _download_part(url, part, bar, attempts, check_later=True)
            actual = file_sha256(part)
        if sha256 and actual != sha256.lower():
            _discard(part)
            raise CourseError(
                f"{url}: wrong sha256 {actual}, expected {sha256}; the download was deleted: "
                "run again, and if it stays wrong, use another mirror"
            )
        os.replace(part, path)
        _discard(part)
    return path


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a file as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download_part(url: str, part: Path, bar: Progress | None, attempts: int, *, check_later: bool) -> bool:
    """Fill `part` until whole; return whether bytes of an earlier call are in it."""
    import httpx2

    resumed = part.exists()
    furthest, failures = _size(part), 0
    timeout = httpx2.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    with httpx2.Client(follow_redirects=True, timeout=timeout) as client:
        while True:
            wait = None
            try:
                _one_attempt(client, url, part, bar, check_later=check_later)
                return resumed
            except _TryAgainError as error:
                reason, wait = str(error), error.wait
            except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
                raise InputError(f"{url}: not an address to download from ({error})") from None
            except httpx2.TransportError as error:
                reason = str(error) or type(error).__name__
                if "CERTIFICATE_VERIFY_FAILED" in reason:
                    raise CourseError(
                        f"{url}: the server's certificate is not trusted here; set SSL_CERT_FILE to your organisation's certificate"
                    ) from error
            except httpx2.HTTPError as error:
                raise CourseError(f"{url}: {error}; check the address") from error
            failures = 1 if _size(part) > furthest else failures + 1
            furthest = max(furthest, _size(part))
            if failures >= attempts:
                kept = f"; {furthest / 1e6:.1f} MB are kept and the next call goes on from there" if furthest else ""
                raise CourseError(
                    f"{url}: gave up after {attempts} attempt{'s' if attempts > 1 else ''} ({reason}){kept}; check the network or proxy and run again"
                )
            time.sleep(
                min(wait if wait is not None else FIRST_WAIT_SECONDS * 2 ** (failures - 1), LONGEST_WAIT_SECONDS)
            )


def _one_attempt(client: httpx2.Client, url: str, part: Path, bar: Progress | None, *, check_later: bool) -> None:
    """Ask for what is missing and append it; return when `part` is whole."""
    have, version = _size(part), _read_version(part)
    # identity: a compressed body would make Content-Length and byte ranges speak of other bytes than ours.
    headers = {"Accept-Encoding": "identity"}
    if have and (version or check_later):
        headers["Range"] = f"bytes={have}-"
        if version:
            headers["If-Range"] = version
    with client.stream("GET", url, headers=headers) as response:
        if response.status_code == 416 and "Range" in headers:
            if response.headers.get("content-range", "").strip() == f"bytes */{have}":
                return
            _discard(part)
            raise _TryAgainError("the file on the server is shorter than the part kept here")
        _raise_for_status(url, response)
        append = response.status_code == 206
        if append and not response.headers.get("content-range", "").startswith(f"bytes {have}-"):
            _discard(part)
            raise _TryAgainError(f"the server sent another range than bytes {have}-")
        if not append:
            have = 0
        encoded = response.headers.get("content-encoding", "identity") != "identity"
        length = response.headers.get("content-length", "")
        total = have + int(length) if length.isdigit() and not encoded else None
        with open(part, "ab" if append else "wb") as file:
            if not append:
                _write_version(part, response)
            task = bar.tasks[0].id if bar else None
            if bar:
                bar.update(task, completed=have, total=total)
            for chunk in response.iter_bytes():
                file.write(chunk)
                if bar:
                    bar.update(task, advance=len(chunk))
    if total is not None and _size(part) != total:
        if _size(part) > total:
            _discard(part)
        raise _TryAgainError(f"{_size(part)} of {total} bytes came")


def _raise_for_status(url: str, response: httpx2.Response) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    if status in RETRIED_STATUS:
        raise _TryAgainError(f"HTTP {status}", _retry_after(response.headers.get("retry-after", "")))
    advice = {
        401: "needs a login; check your credentials",
        403: "access refused; check your credentials, or accept the licence on its page",
        404: "not found; check the address",
        410: "no longer there; check the address",
    }.get(status, "unexpected answer; check the address")
    raise CourseError(f"{url}: {advice} (HTTP {status})")


def _retry_after(value: str) -> float | None:
    """Seconds to wait by a Retry-After header: seconds or an HTTP date (RFC 9110, 10.2.3)."""
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


def _copy(url: str, part: Path) -> bool:
    source = Path(url2pathname(urlsplit(url).path))
    if not source.is_file():
        raise InputError(f"{url}: no such file; check the path")
    shutil.copyfile(source, part)
    return False


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _version_path(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _read_version(part: Path) -> str:
    return _version_path(part).read_text(encoding="utf-8") if _version_path(part).exists() else ""


def _write_version(part: Path, response: httpx2.Response) -> None:
    etag = response.headers.get("etag", "")
    # If-Range takes no weak ETag: two texts with the same weak one may differ in bytes.
    version = response.headers.get("last-modified", "") if not etag or etag.startswith("W/") else etag
    _version_path(part).write_text(version, encoding="utf-8")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _version_path(part).unlink(missing_ok=True)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CourseError(
                f"{path}: the disk is full; free some space and run again: the download goes on from there"
            ) from error
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error


@contextmanager
def _bar(name: str, wanted: bool) -> Iterator[Progress | None]:
    """A bar on stderr: bytes, speed, time left; nothing where stderr is no terminal, so that logs stay clean."""
    if not wanted or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        bar.add_task(name, total=None)
        yield bar
