"""InternLM checkpoints as transformers' Llama: what their config.json says in Llama's words, and how their tensors are read.

`register` makes transformers' Auto classes know the three families. The weights go through transformers' own conversion, one
tensor at a time, so quantising on the way in and placing on devices work as for any model. In memory the model is a Llama;
`save_pretrained` writes the family's own config.json and tensors again.

Sources: configuration_internlm.py, modeling_internlm.py in https://github.com/InternLM/InternLM (tools/transformers, revision
095ebfff), configuration_internlm2.py and modeling_internlm2.py on the Hub (internlm/internlm2-chat-7b), and for InternLM3
configuration_internlm3.py (internlm/internlm3-8b-instruct).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from course_lib.internlm.layout import FUSED, PARTS, RENAMED, InternLM2Layout

ROPE_TYPES = ("default", "dynamic", "linear")  # of the three families' code
OF_LLAMA = (
    "attention_bias",
    "mlp_bias",
    "rope_parameters",
    "head_dim",
)  # keys of the config that the families do not have


class _Config(LlamaConfig):
    """A Llama's settings, read from the family's keys and written as them."""

    checkpoint_type = ""  # `model_type` in config.json
    architecture = ""

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)
        super().__post_init__(**kwargs)
        kind = self.rope_parameters["rope_type"]
        if kind not in ROPE_TYPES:
            raise ValueError(f"rotary embedding of type {kind!r} is unknown: {', '.join(ROPE_TYPES)} are known")
        if self.architectures and self.architecture not in self.architectures:
            raise ValueError(f"{self.architectures[0]} is no {self.architecture}, and only that is known")

    def to_dict(self) -> dict[str, Any]:
        written = super().to_dict()
        for key in OF_LLAMA:
            written.pop(key, None)
        return {**written, **self._own_keys(), "model_type": self.checkpoint_type, "architectures": [self.architecture]}

    def _own_keys(self) -> dict[str, Any]:
        raise NotImplementedError

    def _scaling(self) -> dict[str, Any] | None:
        rope = self.rope_parameters
        return None if rope["rope_type"] == "default" else {"type": rope["rope_type"], "factor": rope["factor"]}


class InternLMConfig(_Config):
    """InternLM 7B and 20B: `bias` on q, k, v and o; `rotary` of type origin or dynamic (without the key: dynamic)."""

    checkpoint_type = "internlm"
    architecture = "InternLMForCausalLM"

    def __post_init__(self, **kwargs: Any) -> None:
        self.attention_bias = kwargs.pop("bias", True)
        rotary = kwargs.pop("rotary", None) or {"type": "dynamic"}
        kind = "default" if rotary["type"] == "origin" else rotary["type"]
        self.rope_parameters = {"rope_type": kind, "rope_theta": float(rotary.get("base", 10000))}
        if kind != "default":
            self.rope_parameters["factor"] = float(rotary.get("scaling_factor", 1.0))
        super().__post_init__(**kwargs)

    def _own_keys(self) -> dict[str, Any]:
        rope, scaling = self.rope_parameters, self._scaling() or {"type": "origin", "factor": 1.0}
        rotary = {"type": scaling["type"], "base": rope["rope_theta"], "scaling_factor": scaling["factor"]}
        return {"bias": self.attention_bias, "rotary": rotary}


class InternLM2Config(_Config):
    """InternLM2 and 2.5: `bias` on wqkv and wo, groups of query heads, `rope_scaling` of type dynamic or linear."""

    checkpoint_type = "internlm2"
    architecture = "InternLM2ForCausalLM"

    def __post_init__(self, **kwargs: Any) -> None:
        self.attention_bias = kwargs.pop("bias", True)
        super().__post_init__(**kwargs)

    def _own_keys(self) -> dict[str, Any]:
        theta = self.rope_parameters["rope_theta"]
        return {"bias": self.attention_bias, "rope_theta": theta, "rope_scaling": self._scaling()}


class InternLM3Config(_Config):
    """InternLM3: `qkv_bias` on q, k and v, `bias` on all other linear layers. A Llama has one switch for q, k, v and o."""

    checkpoint_type = "internlm3"
    architecture = "InternLM3ForCausalLM"

    def __post_init__(self, **kwargs: Any) -> None:
        self.mlp_bias, self.attention_bias = kwargs.pop("bias", False), kwargs.pop("qkv_bias", False)
        if self.mlp_bias != self.attention_bias:
            raise ValueError(f"bias {self.mlp_bias} with qkv_bias {self.attention_bias} makes it no Llama")
        super().__post_init__(**kwargs)

    def _own_keys(self) -> dict[str, Any]:
        rope, scaling = self.rope_parameters, self._scaling()
        scaling = {"rope_type": scaling["type"], "factor": scaling["factor"]} if scaling else None
        own = {"bias": self.mlp_bias, "qkv_bias": self.attention_bias, "head_dim": self.head_dim}
        return {**own, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}


class _RotaryEmbedding(LlamaRotaryEmbedding):
    """Rotation whose base, of type dynamic, is that of the text's own length, as in the families' code.

    transformers computes the same base, but keeps the one of the longest text until a text comes that needs none. What
    remains different: InternLM's own code keeps keys unrotated and turns all of them anew at each token it generates past
    `max_position_embeddings`; here, as in InternLM2 and Llama, a key keeps the turn it was given.
    """

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.max_seq_len_cached is not self.original_max_seq_len:
            self.inv_freq = self.original_inv_freq.to(x.device)
            self.max_seq_len_cached = self.original_max_seq_len
        return super().forward(x, position_ids)


class _Llama(LlamaForCausalLM):
    def __init__(self, config: _Config) -> None:
        super().__init__(config)
        self.model.rotary_emb = _RotaryEmbedding(config)
        self.post_init()


class InternLMLlama(_Llama):
    """InternLM 7B and 20B."""

    config_class = InternLMConfig


class InternLM2Llama(_Llama):
    """InternLM2 and 2.5."""

    config_class = InternLM2Config


class InternLM3Llama(_Llama):
    """InternLM3."""

    config_class = InternLM3Config


class SplitHeads(ConversionOps):
    """`wqkv` into q, k and v."""

    def convert(
        self, input_dict: dict[str, Any], target_patterns: list[str], config: LlamaConfig, **_: Any
    ) -> dict[str, torch.Tensor]:
        (tensors,) = input_dict.values()
        fused = tensors[0] if isinstance(tensors, list) else tensors
        return dict(zip(target_patterns, _heads(config).split_rows(fused), strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        return JoinHeads()


class JoinHeads(ConversionOps):
    """q, k and v into `wqkv`."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        config: LlamaConfig,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        parts = [input_dict[pattern] for pattern in source_patterns]
        parts = [part[0] if isinstance(part, list) else part for part in parts]
        return {target_patterns[0]: _heads(config).join_rows(tuple(parts))}

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitHeads()


def _heads(config: LlamaConfig) -> InternLM2Layout:
    assert config.num_key_value_heads is not None  # Llama's config fills it in
    return InternLM2Layout(query_heads=config.num_attention_heads, kv_heads=config.num_key_value_heads)


def register() -> None:
    """Let transformers' AutoConfig and AutoModelForCausalLM know the families. May be called again."""
    for config, model in (
        (InternLMConfig, InternLMLlama),
        (InternLM2Config, InternLM2Llama),
        (InternLM3Config, InternLM3Llama),
    ):
        # not by AutoConfig.register, which wants the name on disk to be that in memory
        CONFIG_MAPPING.register(config.checkpoint_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
    renamings = [
        WeightRenaming(rf"^{old}\." if old == "output" else f"{old}.", f"{new}.") for old, new in RENAMED.items()
    ]
    fused = WeightConverter(FUSED, list(PARTS), [SplitHeads()])
    # By the class: under the name "internlm2", peft too would take the tensors apart, and in its own way.
    register_checkpoint_conversion_mapping(InternLM2Llama.__name__, [*renamings, fused], overwrite=True)
