"""The sizes of a model, from its config.json alone: what its memory and the count of its parameters follow from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course_lib.errors import InputError
from course_lib.files import read_json
from course_lib.internlm import is_internlm
from course_lib.models import catalogue, is_cached, model_folder
from course_lib.training.fused_sizes import FAMILIES

SHAPES_FILE = Path(__file__).parent / "model_shapes.yaml"


@dataclass(frozen=True)
class LinearShape:
    """A linear layer of a decoder layer, by its name there, such as `self_attn.q_proj`."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        """Of weight and bias."""
        return self.inputs * self.outputs + self.outputs * self.bias


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder, in elements.

    Attributes:
        model_type: as transformers knows the loaded model: an InternLM is a Llama.
        width: of the hidden state; `head_dim` is that of one attention head.
        tied: embedding and head are one matrix.
        linears: of one decoder layer; all layers are alike.
        layer_extras: parameters of a layer that are in no linear one, such as norms; `extras`: of the model, in no layer.
        window: tokens a position attends back to, or None for all.
    """

    name: str
    model_type: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    linears: tuple[LinearShape, ...]
    layer_extras: int
    extras: int
    head_norms: bool = False
    window: int | None = None

    @property
    def intermediate(self) -> int:
        """Width of the hidden state between the linear layers of the MLP."""
        return max(linear.inputs for linear in self.linears)

    @property
    def table(self) -> int:
        """Elements of the embedding, and of the head."""
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """Of the whole model; a tied head counts once."""
        layer = sum(linear.parameters for linear in self.linears) + self.layer_extras
        return self.layers * layer + self.extras + self.table * (1 if self.tied else 2)

    @staticmethod
    def of(name_or_folder: str | Path) -> ModelShape:
        """The shape of a model in a folder or in the cache, or of one of the catalogue that is not here.

        Raises:
            InputError: no such model; a Hub repository that is not here; or a config.json that holds no decoder.
        """
        name = str(name_or_folder)
        if name.lower() in catalogue() and not (Path(name) / "config.json").is_file() and not is_cached(name):
            return _of_llama(_catalogue_configs()[name.lower()], origin=name)
        folder = model_folder(name_or_folder, fetch_missing=False)
        config = read_json(folder / "config.json")
        if is_internlm(config) or config.get("model_type") in FAMILIES:
            return _of_llama(config, origin=name)
        return _of_other(folder, origin=name)


def _catalogue_configs() -> dict[str, dict[str, Any]]:
    import yaml

    return yaml.safe_load(SHAPES_FILE.read_text(encoding="utf-8"))


def _of_llama(config: dict[str, Any], *, origin: str) -> ModelShape:
    """The shape of Llama and its kin, whose layers differ in biases and head norms only."""

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{origin}: {key} is {value!r} in config.json, not a size; fetch the model again")
        return value

    family = config["model_type"]
    width, inner, heads = size("hidden_size"), size("intermediate_size"), size("num_attention_heads")
    kv_heads = size("num_key_value_heads", heads)
    head_dim = size("head_dim", 128 if family == "qwen3" else max(1, width // heads))
    queries, keys = heads * head_dim, kv_heads * head_dim
    # as transformers' classes, and internlm/model.py, read them
    given = {"internlm": ("bias", True), "internlm2": ("bias", True), "internlm3": ("qkv_bias", False)}
    key, default = given.get(family, ("attention_bias", False))
    qkv_bias = family == "qwen2" or bool(config.get(key, default))
    mlp_bias = bool(config.get("bias" if family == "internlm3" else "mlp_bias", False)) and family != "internlm"
    linears = (
        LinearShape("self_attn.q_proj", width, queries, qkv_bias),
        LinearShape("self_attn.k_proj", width, keys, qkv_bias),
        LinearShape("self_attn.v_proj", width, keys, qkv_bias),
        LinearShape("self_attn.o_proj", queries, width, qkv_bias and family != "qwen2"),
        LinearShape("mlp.gate_proj", width, inner, mlp_bias),
        LinearShape("mlp.up_proj", width, inner, mlp_bias),
        LinearShape("mlp.down_proj", inner, width, mlp_bias),
    )
    window = config.get("sliding_window") if config.get("use_sliding_window", family == "mistral") else None
    head_norms = family == "qwen3"
    return ModelShape(
        name=origin,
        model_type="llama" if is_internlm(config) else family,
        layers=size("num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=size("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        linears=linears,
        layer_extras=2 * width + 2 * head_dim * head_norms,
        extras=width,
        head_norms=head_norms,
        window=window,
    )


def _of_other(folder: Path, *, origin: str) -> ModelShape:
    """The shape of any other decoder, by building it without memory (on torch's meta device): takes some seconds."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # each model's class has its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{origin}: its config.json makes no language model that can be planned ({reason})") from error
    text = config.get_text_config()
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = max(stacks, key=lambda stack: sum(parameter.numel() for parameter in stack.parameters()))
    linears = []
    for name, module in layers[0].named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            inputs, outputs = module.weight.shape if isinstance(module, Conv1D) else reversed(module.weight.shape)
            linears.append(LinearShape(name, inputs, outputs, module.bias is not None))
    in_layers = sum(parameter.numel() for parameter in layers.parameters())
    in_tables = table.numel() + (0 if head is table else head.numel())
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return ModelShape(
        name=origin,
        model_type=config.model_type,
        layers=len(layers),
        width=table.shape[1],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=getattr(text, "head_dim", None) or table.shape[1] // heads,
        vocabulary=table.shape[0],
        tied=head is table,
        linears=tuple(linears),
        layer_extras=in_layers // len(layers) - sum(linear.parameters for linear in linears),
        extras=model.num_parameters() - in_layers - in_tables,
        window=getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None,
    )
