"""Keys and tokens in files that are about to be published: those of this machine's environment, and texts that look like one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from course_lib.errors import InputError

# What the makers of each key say of its form: kind of key -> pattern.
PATTERNS = {
    "a Hugging Face token": rb"\bhf_[A-Za-z0-9]{30,}\b",
    "a ModelScope token": rb"\bms-[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b",
    "an API key": rb"\bsk-[A-Za-z0-9_-]{32,}",
    "a GitHub token": rb"\b(?:gh[oprsu]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60,})\b",
    "an AWS key": rb"\bAKIA[0-9A-Z]{16}\b",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
SECRET_NAMES = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|AK|SK)$")  # of environment variables
SHORTEST = 12  # characters: a shorter value is found in any text
CHUNK, OVERLAP = 2**24, 2**12
# The text in a file of weights stands at its beginning; the rest is numbers.
WEIGHTS = (".safetensors", ".gguf")


def check_no_secrets(files: Iterable[tuple[str, Path | bytes]], tokens: Iterable[str] = ()) -> None:
    """See that none of the files, (name, path or content), holds a secret. Files of weights are read up to 16 MiB.

    `tokens` are secrets beyond those in environment variables named *_TOKEN, *_KEY, *_SECRET, *_PASSWORD, *_AK or *_SK.

    Raises:
        InputError: one does; the message names the file and the kind of secret, never the secret.
    """
    known = {name: value for name, value in os.environ.items() if SECRET_NAMES.search(name.upper())}
    known |= {f"the token in use ({number})": value for number, value in enumerate(tokens, start=1)}
    own = {f"the value of {name}": re.escape(value.encode()) for name, value in known.items() if len(value) >= SHORTEST}
    kinds = [*own, *PATTERNS]
    pattern = re.compile(b"|".join(b"(%b)" % text for text in [*own.values(), *PATTERNS.values()]))
    for name, content in files:
        if (group := _first_match(pattern, content)) is not None:
            raise InputError(f"{name}: holds {kinds[group - 1]}; take it out before you publish (nothing was sent)")


def _first_match(pattern: re.Pattern[bytes], content: Path | bytes) -> int | None:
    """Number of the group that is found first in a chunk; None where nothing is."""
    if isinstance(content, bytes):
        match = pattern.search(content)
        return match.lastindex if match else None
    with content.open("rb") as file:
        tail = b""
        while chunk := file.read(CHUNK):
            if match := pattern.search(tail + chunk):
                return match.lastindex
            if content.suffix in WEIGHTS:
                return None
            tail = chunk[-OVERLAP:]
    return None
