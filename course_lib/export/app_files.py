"""The folder of a web app around a published model: a Space of the Hugging Face Hub, or an OpenXLab app.

A Space of the Hub runs Gradio itself; Streamlit it runs in a container (https://huggingface.co/docs/hub/spaces-sdks-docker).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import requires
from pathlib import Path

import yaml
from packaging.requirements import Requirement

from course_lib.errors import InputError, did_you_mean

KINDS = ("gradio", "streamlit")
APPS = Path(__file__).parent / "apps"
NEEDED = ("torch", "transformers", "peft", "accelerate")
_DOCKERFILE = """FROM python:3.12-slim
RUN useradd --create-home --uid 1000 user
USER user
WORKDIR /home/user/app
ENV PATH=/home/user/.local/bin:$PATH
COPY --chown=user . .
RUN pip install --no-cache-dir -r requirements.txt
EXPOSE 7860
CMD ["streamlit", "run", "app.py", "--server.port=7860", "--server.address=0.0.0.0", "--browser.gatherUsageStats=false"]
"""


def app_files(
    kind: str, *, title: str, model: str, base: str | None, chat_template: str | None, stop: Sequence[str]
) -> dict[str, bytes]:
    """app.py, model.py, its settings and requirements.

    `model` is what transformers or peft loads (a repository, or "." for the app's own folder), `base` an adapter's base,
    `chat_template` the source of a template other than the tokenizer's own, `stop` its single tokens that end an answer.

    Raises:
        InputError: the kind is unknown.
    """
    if kind not in KINDS:
        raise InputError(f"--app {kind!r} is unknown: choose {' or '.join(KINDS)}{did_you_mean(kind, KINDS)}")
    settings = {"title": title, "model": model, "base": base, "chat_template": chat_template, "stop": list(stop)}
    return {
        "app.py": (APPS / f"{kind}_app.py").read_bytes(),
        "model.py": (APPS / "model.py").read_bytes(),
        "app.json": (json.dumps(settings, ensure_ascii=False, indent=1) + "\n").encode(),
        "requirements.txt": "".join(f"{line}\n" for line in [*_requirements(), kind]).encode(),
    }


def _requirements() -> list[str]:
    """The ranges that this library was tested with."""
    ours = map(Requirement, requires("course-lib") or [])
    return [f"{one.name}{one.specifier}" for one in ours if one.name in NEEDED and one.marker is None]


def space_files(kind: str, files: dict[str, bytes], *, title: str, model: str) -> tuple[dict[str, bytes], str]:
    """The files of a Hub's Space around those of `app_files`, and its sdk."""
    sdk = {"gradio": "gradio", "streamlit": "docker"}[kind]
    facts = {"title": title, "sdk": sdk, "models": [model]}
    facts |= {"app_file": "app.py"} if sdk == "gradio" else {"app_port": 7860}
    card = f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}---\n\nA chat with [{model}](https://huggingface.co/{model}).\n"
    docker = {"Dockerfile": _DOCKERFILE.encode()} if sdk == "docker" else {}
    return {**files, **docker, "README.md": card.encode()}, sdk
