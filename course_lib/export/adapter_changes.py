"""What an adapter changes in its base: which tensors, by what, and which of them were quantised under it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from course_lib.errors import InputError
from course_lib.export.stored import Stored
from course_lib.internlm import is_internlm

if TYPE_CHECKING:
    import torch

# what peft saves a part of a LoRA as: module, "embedding_" or nothing, which part, ".weight", ".bias" or nothing
LORA_KEY = r"base_model\.model\.(.+)\.lora_(embedding_)?(A|B|magnitude_vector)(\.weight|\.bias)?"
ROLES = {"A": "a", "B": "b", "magnitude_vector": "magnitude"}


class Structure(NamedTuple):
    """What only the model's code knows, as tensor names on disk."""

    tied: set[str]  # tensors that serve as embedding and as output head; those not on disk by the model's name
    conv1d: set[str] | None  # weights that are (in, out), as in GPT-2; None when not known
    quantised: set[str]  # weights that bitsandbytes quantised under the adapter


@dataclass
class Change:
    """What the adapter does to one tensor of the base."""

    a: torch.Tensor | None = None  # (r, in)
    b: torch.Tensor | None = None  # (out, r)
    scaling: float = 1.0
    magnitude: torch.Tensor | None = None  # (out,): DoRA's
    transposed: bool = False  # the base's tensor is (in, out)
    bias: torch.Tensor | None = None  # lora_B's own bias, added to the layer's
    saved: torch.Tensor | None = None  # trained whole (modules_to_save, biases): takes the tensor's place


def model_structure(
    folder: Path, config: dict[str, Any], stored: dict[str, Stored], record: dict[str, Any], *, trust_remote_code: bool
) -> Structure:
    """Build the model without memory (torch's meta device) and look at it."""
    from transformers import CONFIG_MAPPING

    quantised, dtype = set(), record.get("dtype")
    if is_internlm(config):
        from course_lib.internlm.model import register

        register()
        trust_remote_code = False
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING and not trust_remote_code:
        if dtype in ("nf4", "int8"):
            reason = f"which layers were {dtype} is known only to the model's own code in that folder"
            raise InputError(f"{folder}: {reason}; read it, then ask for it with trust_remote_code")
        heads = {name for name, tensor in stored.items() if tensor.shape[:1] == [config.get("vocab_size")]}
        return Structure(heads | {"lm_head.weight"} if config.get("tie_word_embeddings") else set(), None, set())

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.pytorch_utils import Conv1D

    from course_lib.fetch import quiet_transformers

    try:
        with quiet_transformers(), torch.device("meta"):
            settings = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            model = AutoModelForCausalLM.from_config(settings, trust_remote_code=trust_remote_code)
    except Exception as error:  # wrong fields, code of another transformers version: each raises its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder}: no causal language model can be built from its config.json ({reason})") from error
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    conv1d = {
        _disk_name(f"{name}.weight", stored) for name, module in model.named_modules() if isinstance(module, Conv1D)
    }
    if dtype in ("nf4", "int8"):
        from bitsandbytes.nn import Linear4bit
        from transformers.integrations import replace_with_bnb_linear
        from transformers.quantizers.base import HfQuantizer

        # transformers' own choice of layers, the same for 4 and 8 bits: every linear layer but the output head.
        kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        replace_with_bnb_linear(model, kept, BitsAndBytesConfig(load_in_4bit=True))
        names = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)]
        if missing := [name for name in names if _disk_name(name, stored) is None]:
            raise InputError(
                f"{folder}: {missing[0]} was {dtype} under the adapter, but the weights have no such tensor"
            )
        quantised = {_disk_name(name, stored) for name in names}
    return Structure({_disk_name(name, stored) or name for name in tied}, conv1d, quantised)


def adapter_changes(
    adapter: Path,
    trained: dict[str, torch.Tensor],
    lora: dict[str, Any],
    stored: dict[str, Stored],
    structure: Structure,
) -> dict[str, Change]:
    """Collect what the adapter does to each tensor of the base, by its name on disk, and check that it can. `trained` are its tensors."""
    changes: dict[str, Change] = {}
    for key, tensor in trained.items():
        lora_key = re.fullmatch(LORA_KEY, key)
        if lora_key:
            module, embedding, side, part = lora_key.groups()
            parameter, role = (f"{module}.bias", "bias") if part == ".bias" else (f"{module}.weight", ROLES[side])
        else:
            parameter, role = key.removeprefix("base_model.model.").replace(".base_layer.", "."), "saved"
        name = _disk_name(parameter, stored) or parameter
        if name in structure.tied:
            reason = f"changes {parameter}, but the model shares that tensor between its embedding and its output head"
            raise InputError(f"{adapter}: {reason}; train without it, or on a model whose embeddings are not tied")
        if name not in stored:
            raise InputError(f"{adapter}: {key} is for {parameter}, but the base has no such tensor on disk")
        change = changes.setdefault(name, Change())
        setattr(change, role, tensor)
        if lora_key:
            change.scaling = scaling_of(lora, module)
            # peft's flag tells of the layer that it wrapped: over a quantised Conv1D that is a plain linear one.
            conv1d = lora.get("fan_in_fan_out", False) if structure.conv1d is None else name in structure.conv1d
            change.transposed |= bool(embedding) or conv1d  # an embedding is (vocabulary, width)
    for name, change in changes.items():
        dora = change.a is not None and bool(lora.get("use_dora"))
        if dora != (change.magnitude is not None):
            has = "no DoRA magnitude" if dora else "a DoRA magnitude and no such LoRA"
            raise InputError(f"{adapter}: has {has} for {name}; save the adapter again")
        _check_shapes(name, change, stored[name].shape, adapter)
    return changes


def _disk_name(parameter: str, stored: dict[str, Stored]) -> str | None:
    """Find a model's parameter on disk, where the model's own prefix ("model.", "transformer.") may be missing or added."""
    for name in (parameter, parameter.partition(".")[2]):
        if name in stored:
            return name
    longer = [name for name in stored if name.endswith(f".{parameter}")]
    return longer[0] if len(longer) == 1 else None


def scaling_of(lora: dict[str, Any], module: str) -> float:
    """Return alpha / r, or alpha / sqrt(r) with rsLoRA. A pattern matches the end of a module's name, as in peft's `get_pattern_key`."""

    def setting(patterns: str, default: str) -> float:
        matching = (value for key, value in (lora.get(patterns) or {}).items() if re.match(rf"(.*\.)?({key})$", module))
        return next(matching, lora[default])

    r, alpha = setting("rank_pattern", "r"), setting("alpha_pattern", "lora_alpha")
    return alpha / (sqrt(r) if lora.get("use_rslora") else r)


def _check_shapes(name: str, change: Change, shape: list[int], adapter: Path) -> None:
    if (change.a is None) != (change.b is None):
        raise InputError(f"{adapter}: has only one of the two LoRA matrices for {name}; save the adapter again")
    found = [list(tensor.shape) for tensor in (change.saved, change.bias) if tensor is not None]
    if change.a is not None and change.b is not None:
        product = [change.b.shape[0], change.a.shape[1]] if change.b.shape[1:] == change.a.shape[:1] else []
        found.append(product[::-1] if change.transposed else product)
    if change.magnitude is not None:
        outputs = list(change.magnitude.shape)
        found.append([shape[0], *outputs] if change.transposed else [*outputs, *shape[1:]])
    if wrong := [each for each in found if each != shape]:
        reason = f"changes {name} by a tensor of shape {wrong[0]}, but the base's is {shape}"
        raise InputError(f"{adapter}: {reason}; it is of another model, or of one whose vocabulary was resized")
