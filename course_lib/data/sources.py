"""Where rows come from: a file, a sample of this course, or a file of a data set on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from course_lib.data.formats import read_rows
from course_lib.errors import CourseError, InputError

SAMPLE_FOLDER = Path(__file__).parents[2] / "data"


def sample_rows(file_name: str) -> list[Any]:
    """Rows of a sample written for this course, from the folder `data/` of the checkout."""
    return read_rows(SAMPLE_FOLDER / file_name)


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
