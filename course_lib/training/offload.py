"""Parts of a model that stay in host memory while it trains on a GPU: the recipe's `training.offload`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from course_lib.models import load_model
from course_lib.recipe import ModelSettings
from course_lib.training.host_memory import HostEmbedding, HostHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_on_host(folder: Path, settings: ModelSettings, *, layers: bool) -> PreTrainedModel:
    """Load a model for training with parts of it elsewhere than on the GPU: all of it goes into host memory first, in 16 bits.

    For nf4, the layers' weights are quantised on the GPU one by one. They stay there, or come back where `layers` is true.
    """
    compute = _compute_dtype(settings)
    dtype = compute if settings.dtype in ("nf4", "auto") else settings.dtype
    model, _ = load_model(folder, dtype=dtype, device="cpu", trust_remote_code=settings.trust_remote_code)
    if settings.dtype == "nf4":
        gpu = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        _quantise(
            model,
            double_quant=settings.double_quant,
            compute_dtype=getattr(torch, compute),
            quantise_on=gpu,
            keep_on=torch.device("cpu") if layers else gpu,
        )
    return model


def place(model: nn.Module, offload: Collection[str], device: torch.device) -> None:
    """Put a Llama-like model on the device, but for what is offloaded. An embedding and a head that are one go together."""
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    table, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
    if "embedding" in offload or (tied and "head" in offload):
        model.model.embed_tokens = HostEmbedding(table, device)
    if "head" in offload or (tied and "embedding" in offload):
        model.lm_head = HostHead(head, device)
    stay = {id(linear.weight) for linear in _frozen_linears(model)} if "layers" in offload else set()
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in stay:
            tensor.data = tensor.data.to(device)


def _quantise(
    model: PreTrainedModel,
    *,
    double_quant: bool,
    compute_dtype: torch.dtype,
    quantise_on: torch.device,
    keep_on: torch.device,
) -> None:
    """Put NF4 layers in the place of the decoder's linear ones, as transformers does on loading."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import BitsAndBytesConfig

    for layer in model.model.layers:
        linears = [(name, module) for name, module in layer.named_modules() if type(module) is nn.Linear]
        for name, module in linears:
            arguments: dict[str, Any] = {"compress_statistics": double_quant, "quant_type": "nf4"}
            shape = (module.in_features, module.out_features)
            new = Linear4bit(*shape, bias=False, compute_dtype=compute_dtype, device="meta", **arguments)
            weight = Params4bit(module.weight.data, requires_grad=False, **arguments).to(quantise_on).to(keep_on)
            new.weight, new.bias = weight, module.bias
            module.weight = None  # one copy at a time
            parent, _, child = name.rpartition(".")
            setattr(layer.get_submodule(parent), child, new)
    model.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    model.is_loaded_in_4bit = True  # what peft looks at


def _compute_dtype(settings: ModelSettings) -> str:
    if settings.compute_dtype != "auto":
        return settings.compute_dtype
    if not torch.cuda.is_available():
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def _frozen_linears(model: nn.Module) -> list[nn.Module]:
    modules = (module for layer in model.model.layers for module in layer.modules())
    return [module for module in modules if isinstance(module, nn.Linear) and not module.weight.requires_grad]
