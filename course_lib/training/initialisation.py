"""Where adapters start, other than at a random A and a B of zeros: from the weights (PiSSA, OLoRA) or from activations (EVA).

PiSSA (Meng et al. 2024, arXiv 2404.02948) takes A and B from the largest singular values of W, OLoRA (Büyükakyüz 2024, arXiv
2406.01775) from its QR decomposition. So that the model still computes what it did, the start s B₀ A₀ is taken out of W. The adapter
for the base as it was is then W' - W = s (B A - B₀ A₀) = s [B -B₀] [A; A₀]: one of twice the rank. That is what is saved, in checkpoints
too: it holds A, B and the start, and anyone's peft loads it on the unchanged base.

EVA (Paischer et al. 2024, arXiv 2410.07170) takes A from the directions in which a layer's inputs vary most, on the data to be learnt.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any

from course_lib.data.collate import pad
from course_lib.data.tokenize import Example
from course_lib.errors import CourseError, InputError
from course_lib.training.distributed import same_everywhere

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from torch import nn

# of the randomised SVD: at 16 passes the paper finds an error of 1e-7, in seconds where the exact one takes minutes
PISSA = "pissa_niter_16"
EVA_EXAMPLES, EVA_POSITIONS = 256, 2**14  # the most that EVA looks at, padding included
EVA_TOKENS, EVA_TOKENS_A_RANK = 512, 16  # trained tokens that are enough
EVA_PASSES = 12  # three are the least
EVA_TAU = 0.9  # cosine of a direction found in two passes over the same tokens: they differ by rounding alone


def start_from_weights(model: PeftModel, init: str) -> None:
    """Give each A and B its part of the base's weight, by `init` pissa or olora, and take that out of the weight.

    Raises:
        InputError: a layer's weight is quantised, shared with the embedding, or of a lower rank than the adapter.
    """
    import torch

    for name, layer in _adapted(model):
        base, lora_a, lora_b = _parts(layer)
        _check_can_change(model, name, base, init)
        _check_rank(name, layer, init)
        original, like = base.weight.data, lora_a.weight.data
        # peft computes the start, on a copy: what is taken out is the start as it is kept, which may be in bfloat16
        base.weight.data = original.to("cuda" if torch.cuda.is_available() else original.device, copy=True)
        with torch.no_grad():
            layer.pissa_init("default", PISSA) if init == "pissa" else layer.olora_init("default")
        for matrix in (lora_a, lora_b):
            matrix.weight.data = matrix.weight.data.to(like.device, like.dtype).contiguous()
        base.weight.data = original
        same_everywhere([lora_a.weight, lora_b.weight])  # a GPU may decompose otherwise than its neighbour
        _subtract(layer, lora_a.weight.data, lora_b.weight.data)


def start_from_saved(model: PeftModel, saved: dict[str, torch.Tensor]) -> None:
    """Take out of the base's weights what the run that saved these tensors took out of them. A and B are left for `load_weights`."""
    for name, layer in _adapted(model):
        rank = layer.r["default"]
        _subtract(layer, saved[f"{name}.lora_A.weight"][rank:], -saved[f"{name}.lora_B.weight"][:, rank:])


def changes_base(model: PeftModel) -> bool:
    """Whether the adapters' start was taken out of the base's weights."""
    return any(hasattr(layer, "subtracted") for _, layer in _adapted(model))


def for_unchanged_base(
    model: PeftModel, tensors: dict[str, torch.Tensor], config: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Make of an adapter, and of peft's settings for it, those of twice the rank that fit the base as it was."""
    import torch

    tensors = dict(tensors)
    for name, layer in _adapted(model):
        a, b = (f"{name}.lora_{side}.weight" for side in "AB")
        start_a, start_b = layer.subtracted
        tensors[a] = torch.cat([tensors[a], start_a])
        tensors[b] = torch.cat([tensors[b], -start_b], dim=1)
    more = sqrt(2) if config["use_rslora"] else 2  # the scale stays as it is
    return tensors, {**config, "r": 2 * config["r"], "lora_alpha": more * config["lora_alpha"]}


def for_changed_base(model: PeftModel, saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take out of what `for_unchanged_base` made the adapter as it is trained.

    Raises:
        CourseError: it began from another start than the model's.
    """
    import torch

    tensors = dict(saved)
    for name, layer in _adapted(model):
        a, b = (f"{name}.lora_{side}.weight" for side in "AB")
        rank = layer.r["default"]
        start_a, start_b = layer.subtracted
        if not torch.equal(saved[a][rank:], start_a) or not torch.equal(saved[b][:, rank:], -start_b):
            raise CourseError(f"{name}: the checkpoint began from another start than this run; resume it anew")
        tensors[a], tensors[b] = saved[a][:rank], saved[b][:, :rank]
    return tensors


def start_from_activations(model: PeftModel, examples: Sequence[Example], *, seed: int) -> None:
    """Set each A to the directions in which the layer's inputs vary most, at the trained tokens of some examples (EVA).

    Every layer keeps its rank (ρ = 1 in the paper's terms). What is looked at follows from the seed.

    Raises:
        InputError: the examples have too few trained tokens, or too few that differ, for the rank.
    """
    from peft import LoraConfig, get_eva_state_dict
    from peft.tuners.lora.config import EvaConfig

    for name, layer in _adapted(model):
        _check_rank(name, layer, "eva")
    rank = model.peft_config["default"].r
    chosen = _some(examples, tokens=max(EVA_TOKENS, EVA_TOKENS_A_RANK * rank), seed=seed)
    tokens, passes = sum(example.trained_tokens for example in chosen), 0
    advice = "lower lora.r, give more rows, or leave lora.init at default"
    if tokens < rank:
        raise InputError(
            f"lora.init = eva needs lora.r = {rank} trained tokens or more, and {len(chosen)} rows have {tokens}; {advice}"
        )

    def forward(model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
        nonlocal passes
        passes += 1
        if passes > EVA_PASSES:  # peft itself would go on for ever
            raise InputError(
                f"lora.init = eva finds no lora.r = {rank} directions in the {tokens} trained tokens of {len(chosen)} rows: "
                f"too few of them differ; {advice}"
            )
        model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, logits_to_keep=1)

    starts = get_eva_state_dict(
        model,
        _OneBatch(chosen),
        peft_config=LoraConfig(r=rank, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0, tau=EVA_TAU)),
        forward_fn=forward,
        gather_distributed_inputs=False,  # every process sees the same examples
        show_progress_bar=False,
    )
    for name, layer in _adapted(model):
        layer.lora_A["default"].weight.data.copy_(starts[name])


class _OneBatch:
    """A data loader of one batch. peft's first look at it is only to see which layers share an input, number by number: a
    short example does for that."""

    def __init__(self, examples: Sequence[Example]) -> None:
        first = examples[0]
        self.short = pad([Example(first.input_ids[:8], first.input_ids[:8])], pad_token_id=0)
        self.whole = pad(examples, pad_token_id=0)
        self.looks = 0

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.looks += 1
        yield self.short if self.looks == 1 else self.whole


def _some(examples: Sequence[Example], *, tokens: int, seed: int) -> list[Example]:
    """Examples drawn at random until they have so many trained tokens, or are as many as EVA looks at."""
    chosen: list[Example] = []
    longest = 0
    for index in random.Random(seed).sample(range(len(examples)), min(len(examples), EVA_EXAMPLES)):
        example = examples[index]
        longest = max(longest, len(example.input_ids))
        if chosen and longest * (len(chosen) + 1) > EVA_POSITIONS:
            break
        chosen.append(example)
        tokens -= example.trained_tokens
        if tokens <= 0:
            break
    return chosen


def _adapted(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """Layers with an adapter, by the name that peft saves their matrices under."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _parts(layer: LoraLayer) -> tuple[nn.Module, nn.Module, nn.Module]:
    return layer.get_base_layer(), layer.lora_A["default"], layer.lora_B["default"]


def _subtract(layer: LoraLayer, a: torch.Tensor, b: torch.Tensor) -> None:
    """Take s B A out of the base's weight, in float32, and keep A and B with the layer."""
    weight = layer.get_base_layer().weight.data
    start = (layer.scaling["default"] * b.to(weight.device).float()) @ a.to(weight.device).float()
    weight.copy_(weight.float() - start)
    layer.subtracted = a.cpu().clone(), b.cpu().clone()


def _check_can_change(model: PeftModel, name: str, base: nn.Module, init: str) -> None:
    from torch import nn

    module = name.removeprefix("base_model.model.")
    if not isinstance(base, nn.Linear) or not base.weight.is_floating_point() or hasattr(base.weight, "quant_state"):
        raise InputError(
            f"lora.init = {init} changes the base's weights, and {module} is a {type(base).__name__} of {base.weight.dtype}; "
            "set lora.init to eva or default"
        )
    if base.weight is model.get_input_embeddings().weight:
        raise InputError(
            f"lora.init = {init} changes the base's weights, and {module} shares its own with the embedding; leave it out of "
            "lora.targets"
        )


def _check_rank(name: str, layer: LoraLayer, init: str) -> None:
    base, rank = layer.get_base_layer(), layer.r["default"]
    if rank > min(base.in_features, base.out_features):
        raise InputError(
            f"lora.init = {init} needs lora.r of at most {min(base.in_features, base.out_features)}, the rank of "
            f"{name.removeprefix('base_model.model.')}, and it is {rank}; lower it, or leave lora.init at default"
        )
