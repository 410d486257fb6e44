"""Where the parameters of a model stand in its checkpoint, by name and by row.

InternLM and InternLM3 use Llama's names. InternLM2 renames every module and keeps q, k and v in one matrix, `wqkv`, whose rows
go by key-value head: the query heads that share it, then its key, then its value, head_dim rows each
(https://github.com/InternLM/InternLM/blob/main/tools/convert2llama.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from course_lib.errors import InputError
from course_lib.files import read_json

if TYPE_CHECKING:
    import torch

# a module in an InternLM2 checkpoint -> in Llama
RENAMED = {
    "model.tok_embeddings": "model.embed_tokens",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "output": "lm_head",
}
FUSED = "attention.wqkv"
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


class Layout:
    """A checkpoint that holds every parameter as a tensor of its own, under its own name."""

    def names(self, stored: str) -> tuple[str, ...]:
        """Return the names, in the model, of the parameters that a stored tensor (or module) holds, in their order."""
        return (stored,)

    def stored_name(self, name: str) -> str:
        """Return the stored tensor (or module) that holds a parameter (or module) of the model."""
        return name

    def split(self, stored: str, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Take a stored tensor apart, in the order of `names`."""
        return (tensor,)

    def join(self, stored: str, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Put a stored tensor together again: the inverse of `split`."""
        return parts[0]

    def shapes(self, stored: str, shape: list[int]) -> list[list[int]]:
        """Return the shapes of the parts, in the order of `names`.

        Raises:
            InputError: a tensor of this shape cannot be taken apart.
        """
        return [shape]


@dataclass(frozen=True)
class InternLM2Layout(Layout):
    """InternLM2 and 2.5."""

    query_heads: int
    kv_heads: int

    @property
    def heads(self) -> tuple[int, int, int]:
        """How many heads q, k and v have."""
        return self.query_heads, self.kv_heads, self.kv_heads

    def names(self, stored: str) -> tuple[str, ...]:
        if _has(stored, FUSED):
            return tuple(_replace(stored, FUSED, part) for part in PARTS)
        old = next((old for old in RENAMED if _has(stored, old)), None)
        return (_replace(stored, old, RENAMED[old]),) if old else (stored,)

    def stored_name(self, name: str) -> str:
        back = {**{new: old for old, new in RENAMED.items()}, **dict.fromkeys(PARTS, FUSED)}
        new = next((new for new in back if _has(name, new)), None)
        return _replace(name, new, back[new]) if new else name

    def split(self, stored: str, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.split_rows(tensor) if _has(stored, FUSED) else (tensor,)

    def join(self, stored: str, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.join_rows(parts) if _has(stored, FUSED) else parts[0]

    def shapes(self, stored: str, shape: list[int]) -> list[list[int]]:
        if not _has(stored, FUSED):
            return [shape]
        if shape[0] % sum(self.heads):
            raise InputError(
                f"{stored} has {shape[0]} rows, which are not those of {sum(self.heads)} heads; fetch the model again"
            )
        head_dim = shape[0] // sum(self.heads)
        return [[heads * head_dim, *shape[1:]] for heads in self.heads]

    def split_rows(self, fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Take the rows of `wqkv`, shape (kv_heads · (queries + 2) · head_dim, …), apart into those of q, k and v."""
        queries = self.query_heads // self.kv_heads
        groups = fused.unflatten(0, (self.kv_heads, queries + 2, -1))
        return tuple(part.flatten(0, 2) for part in groups.split([queries, 1, 1], dim=1))

    def join_rows(self, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Put the rows of q, k and v together as those of `wqkv`."""
        import torch

        queries = self.query_heads // self.kv_heads
        groups = [
            part.unflatten(0, (self.kv_heads, heads, -1)) for part, heads in zip(parts, (queries, 1, 1), strict=True)
        ]
        return torch.cat(groups, dim=1).flatten(0, 2)


def layout_of(folder: str | Path) -> Layout:
    """Return the layout of the checkpoint in a model's folder.

    Raises:
        InputError: config.json is missing or damaged, or of an InternLM2 without its numbers of heads.
    """
    config = read_json(Path(folder) / "config.json")
    if config.get("model_type") != "internlm2":
        return Layout()
    query_heads = config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or query_heads
    if not isinstance(query_heads, int) or not isinstance(kv_heads, int) or kv_heads < 1 or query_heads % kv_heads:
        raise InputError(
            f"{folder}: num_attention_heads {query_heads!r} and num_key_value_heads {kv_heads!r} in config.json are no heads in "
            "groups; fetch the model again"
        )
    return InternLM2Layout(query_heads=query_heads, kv_heads=kv_heads)


def _has(name: str, module: str) -> bool:
    """Whether whole components of a dotted name are those of `module`."""
    return re.search(rf"(^|\.){re.escape(module)}(\.|$)", name) is not None


def _replace(name: str, old: str, new: str) -> str:
    return re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\g<1>{new}", name, count=1)
