"""What decides the sizes of the fused layers' tensors, without torch: `course plan` reads it before anything is loaded."""

from __future__ import annotations

from typing import Literal

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # models whose layers are fused

# Linear layers that read the same input, and the pass in which their adapters are part of the product with W. Inputs of the first
# and third come from a norm and output gradients of the others go around one, so a kernel of ours makes the rows beside which an
# adapter's part is written.
GROUPS: tuple[tuple[str, tuple[str, ...], Literal["forward", "backward"]], ...] = (
    ("self_attn", ("q_proj", "k_proj", "v_proj"), "forward"),
    ("self_attn", ("o_proj",), "backward"),
    ("mlp", ("gate_proj", "up_proj"), "forward"),
    ("mlp", ("down_proj",), "backward"),
)

ALIGNMENT = 64  # elements: rows of a matrix begin where the fast products want them
ALIGNMENT_ON_HOST = 256  # bytes between the tensors of a layer in host memory
NF4_BLOCK, NF4_GROUP = 64, 256  # weights that share a scale, scales that share a scale of their own

LOGITS_A_CHUNK = 2**27  # 268 MB in 16 bits: a thousand rows or more, enough to keep a large GPU's matrix units busy
SLICE_OF_HEAD = 2**24  # of a head in host memory: 34 MB in 16 bits, two of them at a time
SLICE_OF_LOGITS = 2**22


def aligned(elements: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-elements // ALIGNMENT) * ALIGNMENT


def slices_of(vocabulary: int, width: int, *, rows: int) -> list[slice]:
    """Slices of a head's rows that keep both a slice and its logits, for `rows` positions, small."""
    size = max(256, min(SLICE_OF_LOGITS // max(1, rows), SLICE_OF_HEAD // width))
    return [slice(start, min(start + size, vocabulary)) for start in range(0, vocabulary, size)]


def checkpointed_layers(setting: bool | int, layers: int) -> int:
    """How many layers, from the first on, run forward again in backward, by the recipe's `gradient_checkpointing`.

    The last layer never does: its backward comes right after its forward, so to keep what it made costs no peak. Those that are
    kept whole are the last ones: what they hold is gone before the first layer is run again.
    """
    return layers - 1 if setting is True else min(int(setting), layers - 1)
