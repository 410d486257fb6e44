"""Where rows come from: a file, a sample of this course, a file on the Hugging Face Hub, or a data set by its name."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course_lib.data.formats import iter_rows, read_rows
from course_lib.download import ATTEMPTS, download
from course_lib.errors import CourseError, InputError, did_you_mean

SAMPLE_FOLDER = Path(__file__).parents[2] / "data"
HUB = "https://huggingface.co"


def sample_rows(file_name: str) -> list[Any]:
    """Rows of a sample written for this course, from the folder `data/` of the checkout."""
    return read_rows(SAMPLE_FOLDER / file_name)


@dataclass(frozen=True)
class DataSource:
    """One entry of `sources.yaml`, which says what each field means."""

    name: str
    title: str
    origin: str
    licence: str
    file: str
    size: int | None
    sha256: str | None
    sample: str | None
    mirrors: dict[str, str]

    @property
    def path(self) -> Path:
        """Where the file stands once it is downloaded: `COURSE_HOME/sources/NAME/FILE`."""
        from course_lib.models import cache_folder

        return cache_folder() / "sources" / self.name / self.file


@dataclass(frozen=True)
class OpenedSource:
    """The file of a data set, or of the sample that stands in for it; `note` is a sentence that says which, and why."""

    path: Path
    is_sample: bool
    note: str


@functools.cache
def sources() -> dict[str, DataSource]:
    """Every data set with a name, in the order of `sources.yaml`."""
    import yaml

    entries = yaml.safe_load((Path(__file__).parent / "sources.yaml").read_text(encoding="utf-8"))
    return {entry["name"]: DataSource(**entry) for entry in entries}


def find_source(name: str) -> DataSource:
    """Look a data set up by name, in any case.

    Raises:
        InputError: no such name; the message holds the nearest ones.
    """
    if name.lower() not in sources():
        raise InputError(f"data set {name!r} is unknown: choose {', '.join(sources())}{did_you_mean(name, sources())}")
    return sources()[name.lower()]


def download_source(
    name: str,
    *,
    mirror: str | None = None,
    attempts: int = ATTEMPTS,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Bring the file of a data set into the cache and return its path; one that is there already is only checked.

    The mirrors are tried in turn, that of `COURSE_SOURCE` (hub, modelscope) first; `HF_ENDPOINT` stands for the Hub. A download that
    broke off goes on where it stopped, in a later call too. A file without a sha256 counts as whole once its first row can be read.

    Args:
        mirror: the name of one mirror, to try no other.
        attempts: failures in a row, without one new byte, after which a mirror is given up.
        say: told in one line of every mirror that is given up.

    Raises:
        InputError: an unknown data set or mirror; the cache cannot be written.
        CourseError: no mirror gave the file, or HF_HUB_OFFLINE forbids to ask.
    """
    source = find_source(name)
    mirrors = _mirrors_in_order(source, mirror)
    if source.sha256 is None and source.path.is_file():
        return source.path
    if _offline() and not source.path.is_file():
        raise CourseError(f"{source.name}: not in the cache, and HF_HUB_OFFLINE is set; unset it to download")
    failed = []
    for place, url in mirrors.items():
        try:
            download(url, source.path, sha256=source.sha256, attempts=attempts, progress=progress)
            if source.sha256 is None:
                _check_readable(source.path, url)
            return source.path
        except InputError:
            raise
        except CourseError as error:
            failed.append(f"{place}: {error}")
            say(failed[-1])
    raise CourseError(f"{source.name}: no mirror gave the file: {' | '.join(failed)}")


def open_source(name: str, *, offline_ok: bool = False, progress: bool = True) -> OpenedSource:
    """Return the file of a data set, downloaded if need be; with `offline_ok` the sample of this course where it cannot be had.

    With `offline_ok` each mirror is asked once, so that a notebook without a network goes on at once.

    Raises:
        InputError: an unknown data set; the cache cannot be written.
        CourseError: the file cannot be had, and `offline_ok` is false or there is no sample.
    """
    source = find_source(name)
    try:
        path = download_source(name, attempts=1 if offline_ok else ATTEMPTS, progress=progress)
    except InputError:
        raise
    except CourseError as error:
        if not offline_ok or source.sample is None:
            raise
        sample = SAMPLE_FOLDER / source.sample
        note = f"{source.name} could not be had, so the sample data/{source.sample}, written for this course, stands in ({error})"
        return OpenedSource(sample, True, note)
    return OpenedSource(path, False, f"{source.name}, from {source.origin}, licence: {source.licence}")


def _mirrors_in_order(source: DataSource, mirror: str | None) -> dict[str, str]:
    if mirror is not None and mirror not in source.mirrors:
        known = ", ".join(source.mirrors)
        raise InputError(
            f"{source.name}: mirror {mirror!r} is unknown: choose {known}{did_you_mean(mirror, source.mirrors)}"
        )
    first = mirror or os.environ.get("COURSE_SOURCE", "")
    names = [mirror] if mirror else sorted(source.mirrors, key=lambda place: place != first)
    endpoint = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    return {place: source.mirrors[place].replace(HUB, endpoint, 1) for place in names}


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}


def _check_readable(path: Path, url: str) -> None:
    try:
        next(iter_rows(path))
    except InputError as error:
        path.unlink()
        raise CourseError(
            f"{url}: what came is no data ({error}); it was deleted: if a login page stands in between, log in first"
        ) from error


def locate(path: str) -> Path:
    """Return a local file for `path`.

    `sample:NAME` is a file of the course's `data/` folder; `hf://datasets/OWNER/NAME/FILE` is fetched from the Hub
    (`HF_ENDPOINT` names a mirror) and cached; anything else is a path.

    Raises:
        InputError: a Hub address that names no file.
        CourseError: the Hub file cannot be had.
    """
    if path.startswith("sample:"):
        return SAMPLE_FOLDER / path.removeprefix("sample:")
    if not path.startswith("hf://"):
        return Path(path).expanduser()
    parts = path.removeprefix("hf://").split("/", 3)
    if len(parts) < 4 or parts[0] != "datasets":
        raise InputError(f"{path}: not a data set file; write hf://datasets/OWNER/NAME/FILE")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{parts[1]}/{parts[2]}", parts[3], repo_type="dataset"))
    except Exception as error:  # the hub client raises its own, the HTTP client's and OSError
        reason = " ".join(str(error).split())[:160]
        raise CourseError(
            f"{path}: could not be fetched ({reason}); download it elsewhere and set data.path to the file, or set HF_ENDPOINT to a mirror"
        ) from error
