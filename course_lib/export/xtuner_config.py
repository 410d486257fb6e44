"""What an XTuner config says of an adapter, read as text.

mmengine saves the config of a run in its checkpoints, as the Python source of plain `dict(…)` calls (`Config.pretty_text`, under
`meta["cfg"]`). The source is parsed, never run.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import Any

LONGEST_TEXT = (
    1_000_000  # characters: configs have thousands; deep nesting in much longer ones could exhaust the parser
)
# named templates that put a question as XTuner's of that name do (xtuner/utils/templates.py); others differ in spaces, or in more
SAME_TEMPLATES = ("default", "internlm_chat", "internlm2_chat")


@dataclass(frozen=True)
class XTunerConfig:
    """What is known of the run; empty where the text does not say."""

    lora: dict[str, Any] = field(default_factory=dict)  # arguments of peft's LoraConfig
    base: str = ""  # the base model's name or folder
    base_format: dict[str, Any] = field(default_factory=dict)  # dtype, double_quant, compute_dtype as in course.json
    template: str = "auto"  # our name of its prompt template


def parse_config(text: Any) -> XTunerConfig:
    """Read an XTuner config. Text that is none says nothing."""
    if not isinstance(text, str) or len(text) > LONGEST_TEXT:
        return XTunerConfig()
    try:
        assigned = {
            node.targets[0].id: _value(node.value)
            for node in ast.parse(text).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return XTunerConfig()
    model = _section(assigned, "model")
    llm = _section(model, "llm")
    base, template = llm.get("pretrained_model_name_or_path"), str(assigned.get("prompt_template")).rpartition(".")[2]
    return XTunerConfig(
        lora=_section(model, "lora"),
        base=base if isinstance(base, str) else "",
        base_format=_base_format(llm),
        template=template if template in SAME_TEMPLATES else "auto",
    )


def _base_format(llm: dict[str, Any]) -> dict[str, Any]:
    quantised, loaded = _section(llm, "quantization_config"), _dtype(llm.get("torch_dtype"))
    if quantised.get("load_in_4bit") is True and quantised.get("bnb_4bit_quant_type") == "nf4":
        compute = _dtype(quantised.get("bnb_4bit_compute_dtype"))
        double = quantised.get("bnb_4bit_use_double_quant") is True
        return {"dtype": "nf4", "double_quant": double, **({"compute_dtype": compute} if compute else {})}
    if quantised.get("load_in_8bit") is True:
        return {"dtype": "int8", **({"compute_dtype": loaded} if loaded else {})}
    return {"dtype": loaded} if loaded and not quantised else {}


def _dtype(value: Any) -> str:
    name = str(value).removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else ""


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def _value(node: ast.expr) -> Any:
    """A literal or `dict(…)` of such; None for anything else."""
    if isinstance(node, ast.Call):
        named = isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args
        return {keyword.arg: _value(keyword.value) for keyword in node.keywords if keyword.arg} if named else None
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(element) for element in node.elts]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
