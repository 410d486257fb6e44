"""QLoRA and LoRA on one GPU: this library beside plain peft, on the same random 7B and the same token batches.

    python benchmarks/gpu_training.py [--settings nf4:2:2048 nf4:4:2048:checkpoint …] [--steps 20] [--out benchmarks/results/gpu_training.json]

The model has InternLM-7B's shape (a Llama of 32 layers, width 4096, intermediate 11008, vocabulary 103168, biases on q, k, v, o), random
weights, and LoRA of rank 64 on all seven linear layers, in float32, stepped by 8-bit AdamW. Every side of every setting runs in a process of its own. A setting is
number format : rows : tokens a row [: more …]; all tokens are trained. More are checkpoint (gradient checkpointing; checkpointN of the first
N layers, ours alone), adapters16 (adapters in
bfloat16), and what is kept in host memory: embedding, head, checkpoints, layers. Both sides start from the same weights and adapters.

| side | what |
|---|---|
| ours | `training/fused.py` and the same step as the loop's |
| peft | transformers' own layers and loss under bf16 autocast, SDPA, gradient checkpointing without reentry |
| float32 | peft without autocast: every product and sum in float32, slow; what the others are rounded from |
| trl, trl+liger | TRL's SFTTrainer as it comes, and with Liger's kernels, where they are installed (gpu_peers.py) |

The first 5 steps warm up. Peak memory is what PyTorch allocated in the timed steps, resident is what stays between two. Model FLOPs count the frozen products forward and
by the input backward, causal attention once forward and 2.5 times backward, and LoRA; nothing for recomputing.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

SHAPE = {
    "vocab_size": 103168,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "attention_bias": True,
    "max_position_embeddings": 4096,
}
RANK, WARM_UP = 64, 5
SIDES = ("ours", "peft", "float32", "trl", "trl+liger")
SETTINGS = (
    "nf4:2:2048",
    "nf4:4:2048:checkpoint",
    "nf4:4:2048:checkpoint24",
    "bfloat16:2:2048",
    "bfloat16:4:2048:checkpoint",
    "bfloat16:4:2048:checkpoint24",
    "nf4:1:512:checkpoint",
    "nf4:1:2048:checkpoint",
)
HOST = ("embedding", "head", "checkpoints", "layers")
RESIDENT = "checkpoint:adapters16:embedding:head:checkpoints"
SMALL = tuple(f"nf4:1:{length}:{RESIDENT}{more}" for length in (512, 2048) for more in ("", ":layers"))

Step = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # token ids to loss and gradient norm, on the GPU


def build(dtype: str) -> Any:
    """The random model with adapters, on the GPU. NF4 weights are quantised layer by layer."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"), no_init_weights():
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1) if "norm" in name else parameter.normal_(0, 0.02)
    model.requires_grad_(False)
    if dtype == "nf4":
        quantise(model)
    torch.manual_seed(1)
    lora = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    gc.collect()
    torch.cuda.empty_cache()
    return model.train()


def in_float32(model: Any) -> Any:
    """The same weights, and products in float32. NF4 weights stay as they are."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = torch.float32
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
    return model


def quantise(model: nn.Module) -> None:
    """Put doubly quantised NF4 layers in the place of all linear ones but the head."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        new = Linear4bit(
            module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=torch.bfloat16,
            quant_type="nf4", device="meta",
        )  # fmt: skip
        new.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4").to("cuda")
        new.bias = module.bias
        parent, child = name.rsplit(".", 1)
        setattr(model.get_submodule(parent), child, new)
    model.is_loaded_in_4bit = True  # by which peft chooses its own 4-bit layer, which copies no input


def our_step(model: Any, more: list[str]) -> Step:
    """One optimizer step as training/loop.py does it."""
    from bitsandbytes.optim import AdamW8bit

    from course_lib.data.collate import flatten
    from course_lib.data.tokenize import Example
    from course_lib.training.attention import SEGMENTS
    from course_lib.training.fused import FusedEngine
    from course_lib.training.loss import to_device, trained_tokens

    model.get_base_model().set_attn_implementation(SEGMENTS)
    for parameter in model.parameters():
        if parameter.requires_grad and "adapters16" in more:
            parameter.data = parameter.data.to(torch.bfloat16)
    again = [match[1] for part in more if (match := re.fullmatch(r"checkpoint(\d*)", part))]
    checkpoint = bool(again) and (int(again[0]) if again[0] else True)
    engine = FusedEngine(model, checkpoint=checkpoint, offload=[part for part in HOST if part in more])
    torch.cuda.empty_cache()
    optimizer = AdamW8bit(engine.trainable, lr=1e-4)
    shapes = set()

    def step(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch = flatten([Example(row, row) for row in ids.tolist()])
        on_gpu = {
            name: value if name.startswith(("max_", "labels")) else to_device(value, torch.device("cuda"))
            for name, value in batch.items()
        }
        with torch.autocast("cuda", torch.bfloat16):
            loss = engine.loss({**on_gpu, "segments_alike": ids.shape in shapes}) / trained_tokens(batch)
        shapes.add(ids.shape)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(engine.trainable, 1.0)
        optimizer.step()
        engine.after_step()
        optimizer.zero_grad(set_to_none=False)
        return loss.detach(), norm

    return step


def peft_step(model: Any, more: list[str], autocast: bool = True) -> Step:
    """The same with autograd and transformers' own loss."""
    from bitsandbytes.optim import AdamW8bit

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW8bit(trainable, lr=1e-4)
    if "checkpoint" in more:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def step(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids = ids.cuda()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), norm

    return step


def float32_step(model: Any, more: list[str]) -> Step:
    """The same without bfloat16."""
    return peft_step(in_float32(model), more, autocast=False)


def run_steps(step: Step, batches: list[torch.Tensor]) -> list[list[float]]:
    """Loss and gradient norm of each step, read as training/loop.py does: while the GPU has the next step to do."""
    read, on_their_way = [], []
    for ids in batches:
        values = torch.stack(step(ids)).to("cpu", non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        on_their_way.append((values, arrived))
        if len(on_their_way) > 1:
            values, arrived = on_their_way.pop(0)
            arrived.synchronize()
            read.append(values.tolist())
    torch.cuda.synchronize()
    return read + [values.tolist() for values, _ in on_their_way]


def measure(side: str, setting: str, steps: int) -> dict[str, Any]:
    """Build, warm up, time; an out-of-memory is a result too."""
    dtype, rows, length, *more = setting.split(":")
    generator = torch.Generator().manual_seed(5)
    batches = [
        torch.randint(0, SHAPE["vocab_size"], (int(rows), int(length)), generator=generator) for _ in range(steps)
    ]
    try:
        if side.startswith("trl"):
            from gpu_peers import train_with_trl

            read, seconds, resident = train_with_trl(
                build(dtype), batches, more, warm_up=WARM_UP, liger=side == "trl+liger"
            )
        else:
            step = {"ours": our_step, "peft": peft_step, "float32": float32_step}[side](build(dtype), more)
            read = run_steps(step, batches[:WARM_UP])
            torch.cuda.reset_peak_memory_stats()
            resident = torch.cuda.memory_allocated()
            start = time.perf_counter()
            read += run_steps(step, batches[WARM_UP:])
            seconds = time.perf_counter() - start
    except torch.OutOfMemoryError as error:
        return {"error": str(error).splitlines()[0]}
    speed = batches[0].numel() * (steps - WARM_UP) / seconds
    return {
        "tokens_per_second": speed,
        "model_tflops": speed * flops_a_token(int(length)) / 1e12,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "resident_gb": resident / 1e9,
        "losses": [loss for loss, _ in read],
        "smallest_grad_norm": min(norm for _, norm in read),
    }


def measure_alone(side: str, setting: str, steps: int) -> dict[str, Any]:
    """Measure in a process of its own: a trainer may leave weights behind, which would count in the next one's peak."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
        return process.submit(measure, side, setting, steps).result()


def flops_a_token(length: int) -> float:
    """Model FLOPs of one trained token at this row length."""
    width, inner, layers = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["num_hidden_layers"]
    frozen = layers * (4 * width * width + 3 * width * inner) + width * SHAPE["vocab_size"]
    lora = layers * RANK * (8 * width + 3 * (width + inner))
    return 4 * frozen + 3.5 * 4 * width * length / 2 * layers + 6 * lora


def installed_sides() -> list[str]:
    """Sides whose packages are here; float32 runs where it is named."""
    needs = {"trl": ["trl"], "trl+liger": ["trl", "liger_kernel"]}
    return [side for side in SIDES if side != "float32" and all(find_spec(package) for package in needs.get(side, []))]


def main() -> None:
    """Measure every setting on both sides, print the table, write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=(*SETTINGS, *SMALL))
    parser.add_argument("--sides", nargs="+", default=installed_sides(), choices=SIDES)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_training.json"))
    arguments = parser.parse_args()
    import bitsandbytes
    import peft
    import transformers

    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft, bitsandbytes)}
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "versions": versions, "settings": {}}
    print(f"{'setting':68} {'side':9} {'tokens/s':>9} {'TFLOP/s':>8} {'peak GB':>8} {'first loss':>10} {'last':>8}")
    for setting in arguments.settings:
        for side in arguments.sides:
            if side != "ours" and ({*setting.split(":")} & {*HOST} or re.search(r"checkpoint\d", setting)):
                continue
            found = result["settings"].setdefault(setting, {})[side] = measure_alone(side, setting, arguments.steps)
            if "error" in found:
                print(f"{setting:68} {side:9} {found['error']}", flush=True)
                continue
            print(
                f"{setting:68} {side:9} {found['tokens_per_second']:9,.0f} {found['model_tflops']:8.0f} {found['peak_gb']:8.2f} "
                f"{found['losses'][0]:10.4f} {found['losses'][-1]:8.4f}",
                flush=True,
            )
        sides = result["settings"][setting]
        for other in ("peft", "float32"):
            expected = sides.get(other, {}).get("losses")
            for side, found in sides.items():
                if expected and side != other and "losses" in found:
                    pairs = zip(found["losses"], expected, strict=True)
                    largest = found[f"largest_loss_difference_to_{other}"] = max(abs(one - two) for one, two in pairs)
                    print(f"{setting:68} {side:9} losses differ from {other}'s by at most {largest:.4f}")
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
