"""The replay of a step's memory against the real layers, byte by byte, without a GPU.

Each kernel is replaced by one that makes the tensors its Triton version makes and computes nothing; what the layers make and keep
is their own code's doing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from live_bytes import Tracker, attend
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from course_lib.data.collate import flatten
from course_lib.data.tokenize import Example
from course_lib.model_shape import ModelShape
from course_lib.recipe import LoraSettings, make_recipe
from course_lib.training import fused, fused_layer, fused_linear, host_memory, loss, step_memory
from course_lib.training.adapters import add_lora
from course_lib.training.fused import FusedEngine
from course_lib.training.fused_sizes import checkpointed_layers
from course_lib.training.ledger import Ledger
from course_lib.training.memory_parts import fused_groups
from course_lib.training.step_memory import Step, replay_step

SHAPE = {
    "vocab_size": 997,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=4, attention_bias=True),
    "grouped": Qwen2Config(**SHAPE, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=48),
}
LENGTHS = [70, 33, 57]  # live_bytes.SAMPLES of them


def add_rms_norm(x: Any, y: Any, weight: Any, eps: float, *, out: Any = None) -> Any:
    total = x if y is None else torch.empty_like(x)
    return total, torch.empty_like(x) if out is None else out, torch.empty(len(x))


def rms_norm_backward(grad: Any, x: Any, weight: Any, rstd: Any, residual: Any, *, out: Any = None) -> Any:
    return torch.empty_like(x) if out is None else out, torch.empty_like(x)


KERNELS = {
    "attend": attend,
    "add_rms_norm": add_rms_norm,
    "rms_norm_backward": rms_norm_backward,
    "rotate": lambda *_, **__: None,
    "put_beside": lambda *_: None,
    "swiglu": lambda gate_up: gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2),
    "swiglu_backward_": lambda *_: None,
    "cross_entropy_": lambda logits, targets: torch.empty(len(logits)),
}


@pytest.fixture
def kernels_that_only_allocate(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fused, fused_layer, fused_linear, loss):
        for name, function in KERNELS.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, function)


def measured(
    config: Any, lora: dict[str, Any], *, chunk: int | None, checkpoint: bool | int, offload: list[str]
) -> tuple[dict[str, int], int]:
    """The most bytes in each part of a step, and how many positions were trained."""
    model = AutoModelForCausalLM.from_config(config)
    model = add_lora(model, LoraSettings(**lora)).train()
    engine = FusedEngine(model, checkpoint=checkpoint, offload=offload, loss_chunk=chunk)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(997, (length,), generator=generator).tolist() for length in LENGTHS]
    batch = flatten([Example(row, [-100] * 9 + row[9:]) for row in rows])
    with torch.no_grad():
        engine.forward(batch, keep=True)  # what lasts from step to step is made in the first
        positions, one = loss.trained_positions(batch)[0], torch.ones(())
        with Tracker(before=2 * sum(LENGTHS) * 8) as tracker:
            found = fused.trained_positions

            def at_the_head(batch: Any) -> Any:
                tracker.moment = "head and loss"
                return found(batch)

            fused.trained_positions = at_the_head
            try:
                passed = engine.forward(batch, keep=True)[1]
            finally:
                fused.trained_positions = found
            tracker.moment = "backward pass"
            engine.backward(one, passed)
    return tracker.most, len(positions)


CASES = [  # adapters, checkpointing, offload, whether the head takes more than one chunk, or of how many positions
    ({}, False, [], True),
    ({}, True, [], False),
    ({}, 2, [], 31),
    ({"dropout": 0.1}, False, [], False),
    ({"dropout": 0.1}, True, [], True),
    ({"targets": ["q_proj", "v_proj"]}, True, [], False),
    ({}, True, ["head", "embedding"], True),
    ({}, 2, ["checkpoints"], False),
    ({}, True, ["checkpoints", "embedding", "head", "layers"], False),
]


@pytest.mark.usefixtures("kernels_that_only_allocate")
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(("lora", "checkpoint", "offload", "chunks"), CASES)
def test_the_replay_holds_what_the_layers_hold(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
    family: str,
    lora: dict[str, Any],
    checkpoint: bool | int,
    offload: list[str],
    chunks: bool | int,
) -> None:
    chunk = None if isinstance(chunks, bool) else chunks
    if chunks is True:
        for module in (loss, step_memory):
            monkeypatch.setattr(module, "LOGITS_A_CHUNK", 997 * 50)
        for module in (host_memory, step_memory):
            monkeypatch.setattr(module, "slices_of", lambda *_, rows: [slice(0, 400), slice(400, 800), slice(800, 997)])
    config = CONFIGS[family]
    config.save_pretrained(tmp_path)
    lora = {"r": 8, **lora}
    recipe = make_recipe({"model": {"name": "x", "dtype": "float32"}, "lora": lora, "data": {"path": "x"}})
    shape = ModelShape.of(tmp_path)
    got, trained = measured(config, lora, chunk=chunk, checkpoint=checkpoint, offload=offload)
    step = Step(
        shape=shape, groups=fused_groups(shape, recipe.lora), tokens=sum(LENGTHS), trained=trained, samples=len(LENGTHS),
        element=4,
        checkpointed=checkpointed_layers(checkpoint, shape.layers), offload=frozenset(offload), loss_chunk=chunk,
    )  # fmt: skip
    ledger = Ledger(granule=1)
    replay_step(step, ledger)
    if "head" in offload:  # many small sums come and go there
        assert ledger.moments.pop("head and loss") == pytest.approx(got.pop("head and loss"), rel=0.01)
    assert ledger.moments == got
