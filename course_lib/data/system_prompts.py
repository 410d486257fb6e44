"""System texts by name: what a fine-tuned assistant is told it is, the same words in training and in chat."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import yaml

from course_lib.errors import InputError, did_you_mean

PROMPT_FILE = Path(__file__).parent / "system_prompts.yaml"


@cache
def system_prompts() -> dict[str, str]:
    """All named system texts, in the order of `system_prompts.yaml`."""
    return yaml.safe_load(PROMPT_FILE.read_text(encoding="utf-8"))


def system_prompt(name: str) -> str:
    """Return the system text of that name.

    Raises:
        InputError: there is none.
    """
    texts = system_prompts()
    if name not in texts:
        raise InputError(f"system prompt {name!r} is unknown: choose {', '.join(texts)}{did_you_mean(name, texts)}")
    return texts[name]
