"""The same model served by vLLM, where that is installed: many users at once, several GPUs.

Source of the options: https://docs.vllm.ai/en/latest/cli/serve/. The key goes by the environment, for others can read a process's
arguments.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from course_lib.data.templates import TEMPLATE_FOLDER, named_template
from course_lib.errors import InputError
from course_lib.files import read_json

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be


def vllm_command(
    folder: Path,
    *,
    name: str,
    host: str,
    port: int,
    adapter: Path | None = None,
    bits: int | None = None,
    template: str = "auto",
    trust_remote_code: bool = False,
    tensor_parallel_size: int = 1,
    data_parallel_size: int = 1,
) -> list[str]:
    """The command that serves a model as `name`.

    Raises:
        InputError: vLLM is not installed, cannot quantise to 8 bits, does not take an adapter of that rank, or the template is unknown.
    """
    if importlib.util.find_spec("vllm") is None:
        raise InputError(
            "--engine vllm: vLLM is not installed here; pip install vllm on a machine with a GPU, or leave --engine out"
        )
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        str(folder),
        "--host",
        host,
        "--port",
        str(port),
    ]
    command += ["--tensor-parallel-size", str(tensor_parallel_size), "--data-parallel-size", str(data_parallel_size)]
    if adapter is None:
        command += ["--served-model-name", name]
    else:
        rank = _lora_rank(adapter)
        command += ["--served-model-name", f"{name}-base", "--enable-lora", "--max-lora-rank", str(rank)]
        command += ["--lora-modules", f"{name}={adapter}"]
    if bits == 8:
        raise InputError("--engine vllm --bits 8: vLLM quantises to 4 bits when it loads; use --bits 4")
    if bits == 4:
        command += ["--quantization", "bitsandbytes"]
    if template != "auto":
        command += ["--chat-template", str(TEMPLATE_FOLDER / f"{named_template(template).name}.jinja")]
    if trust_remote_code:
        command.append("--trust-remote-code")
    return command


def _lora_rank(adapter: Path) -> int:
    """The least of vLLM's ranks that holds this adapter's."""
    config = read_json(adapter / "adapter_config.json")
    rank = max([config["r"], *config.get("rank_pattern", {}).values()])
    allowed = next((allowed for allowed in _LORA_RANKS if allowed >= rank), None)
    if allowed is None:
        raise InputError(
            f"{adapter}: has rank {rank}, and vLLM takes up to {_LORA_RANKS[-1]}; merge it: course merge BASE ADAPTER OUT"
        )
    return allowed
