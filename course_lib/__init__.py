"""Fine-tune language models on a laptop or one GPU: the library of the course.

Importing it is quick: torch and transformers load when a function needs them.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from typing import Any

__version__ = "0.1.0"

# where the names a notebook imports from course_lib live
_NAMES = {
    "AgentRunner": "course_lib.agent.runner",
    "agent_of": "course_lib.agent.runner",
    "shipped_tools": "course_lib.agent.tools",
    "tool_from": "course_lib.agent.tools",
    "ChatSession": "course_lib.chat.session",
    "SamplingSettings": "course_lib.chat.session",
    "CourseError": "course_lib.errors",
    "InputError": "course_lib.errors",
    "Recipe": "course_lib.recipe",
    "load_recipe": "course_lib.recipe",
    "recipe_for": "course_lib.recipe",
    "recipe_names": "course_lib.recipe",
    "current_scale": "course_lib.scale",
    "fetch": "course_lib.models",
    "load_model": "course_lib.models",
    "merge": "course_lib.export.merge",
    "train": "course_lib.training.loop",
}
__all__ = sorted(_NAMES)

# OpenMP threads that wait for each other spin by default. On cores shared with other programs that keeps the other thread
# from working: training ran at a sixth of its speed, and at full speed less a fifth on idle cores without spinning.
# Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# GPU memory in segments that grow, which leaves smaller gaps: near the limit it decides whether a run fits, and 5 GiB of
# memory hold the 7B run they are meant for only so (benchmarks/memory_caps.py). Read at the first allocation.
if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# said by libraries at every start, about nothing a user of this one can change
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "kernels-community" not in record.getMessage()
)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'course_lib' has no attribute {name!r}")
    return getattr(importlib.import_module(_NAMES[name]), name)
