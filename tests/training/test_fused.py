"""The fused layers against peft under autograd: loss, and the gradient of every adapter matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from course_lib.data.collate import flatten
from course_lib.data.tokenize import Example
from course_lib.training import fused_linear, host_memory, loss
from course_lib.training.attention import SEGMENTS, attention
from course_lib.training.fused import FusedEngine, why_not_fused
from course_lib.training.fused_linear import drop
from course_lib.training.host_memory import HostHead
from course_lib.training.loss import chunked_loss, streamed_loss, supervised_loss

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "internlm": LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}, attention_bias=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
    "llama, all biased, one key-value head": LlamaConfig(
        **{**SHAPE, "num_key_value_heads": 1}, attention_bias=True, mlp_bias=True
    ),
    "mistral, heads of another width": MistralConfig(**SHAPE, sliding_window=None, head_dim=24),
    "qwen3, biased": Qwen3Config(**SHAPE, head_dim=16, attention_bias=True),
}


def adapted(config: Any, *, dtype: torch.dtype = torch.float64, device: str = "cpu", **lora: Any) -> Any:
    """A random model, biases and norms random too, whose adapters are not zero."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).to(device, dtype)
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name:
            nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    return with_adapters(model, **lora)


def with_adapters(model: PreTrainedModel, **lora: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(**{**settings, **lora}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0, 0.1)
    return model.train()


def batch(device: str = "cpu") -> dict[str, Any]:
    torch.manual_seed(2)
    ids = [torch.randint(97, (length,)).tolist() for length in (17, 9, 30)]
    made = flatten([Example(row, [-100] * 3 + row[3:]) for row in ids])
    return {name: value if name.startswith(("max_", "cu_")) else value.to(device) for name, value in made.items()}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def compare(model: Any, *, checkpoint: bool | int, tolerance: float, device: str = "cpu") -> None:
    """Run autograd's way, then the fused way, on the same adapters."""
    rows = batch(device)
    with attention(model.get_base_model(), SEGMENTS):
        expected = supervised_loss(model, rows)
        expected.backward()
        wanted = gradients(model)
        model.zero_grad()
        assert why_not_fused(model) == ""
        engine = FusedEngine(model, checkpoint=checkpoint)
        for _ in range(2):  # gradients of two micro-batches add up
            got = engine.loss(rows)
            got.backward()
    assert got.item() == pytest.approx(expected.item(), rel=tolerance)
    for name, gradient in gradients(model).items():
        error = (gradient / 2 - wanted[name]).norm() / wanted[name].norm()
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("checkpoint", [False, True, 1])
def test_loss_and_gradients_are_those_of_peft(family: str, checkpoint: bool | int) -> None:
    compare(adapted(CONFIGS[family], dtype=torch.float32), checkpoint=checkpoint, tolerance=1e-4)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["k_proj", "o_proj", "down_proj"]},
        {"rank_pattern": {"q_proj": 2, "up_proj": 6}, "alpha_pattern": {"v_proj": 3}},
        {"use_rslora": True},
    ],
)
def test_some_layers_other_ranks_other_scales(lora: dict[str, Any], checkpoint: bool) -> None:
    compare(adapted(CONFIGS["qwen2"], dtype=torch.float32, **lora), checkpoint=checkpoint, tolerance=1e-4)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_dropout_with_the_same_masks_is_that_of_peft(monkeypatch: pytest.MonkeyPatch, checkpoint: bool) -> None:
    model = adapted(CONFIGS["llama"], dtype=torch.float32, lora_dropout=0.4)
    seeds = iter(range(10**6))

    class Dropped(nn.Dropout):
        """Dropout from a seed of its own, one a module."""

        def __init__(self, p: float) -> None:
            super().__init__(p)
            self.seed = next(seeds)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * drop(torch.ones_like(x[0]), self.p, self.seed)

    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = Dropped(0.4)
    rows = batch()
    order = [m for layer in model.get_base_model().model.layers for m in layer.modules() if hasattr(m, "lora_dropout")]
    given = iter([m.lora_dropout["default"].seed for m in order] * 2)
    monkeypatch.setattr(
        fused_linear.torch, "randint", lambda _, shape: torch.tensor([next(given) for _ in range(shape[0])])
    )
    with attention(model.get_base_model(), SEGMENTS):
        expected = supervised_loss(model, rows)
        expected.backward()
        wanted = gradients(model)
        model.zero_grad()
        engine = FusedEngine(model, checkpoint=checkpoint)
        got = engine.loss(rows)
        got.backward()
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in gradients(model).items():
        assert (gradient - wanted[name]).norm() < 1e-4 * wanted[name].norm(), name


def quantised(double_quant: bool, tmp_path: Any, device: str) -> Any:
    AutoModelForCausalLM.from_config(LlamaConfig(**{**SHAPE, "hidden_size": 256, "intermediate_size": 512})).to(
        torch.bfloat16
    ).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=settings, dtype=torch.bfloat16, device_map=device
    )


def assert_nf4_as_exact_as_peft(tmp_path: Any, double_quant: bool, device: str) -> None:
    """Both ways round to bfloat16 at other places: neither may be further than the other from float32."""
    model = with_adapters(quantised(double_quant, tmp_path, device))
    exact = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).to(device)
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "base_layer"):
            weight = module.base_layer.weight
            exact.get_submodule(name).weight.data = dequantize_4bit(weight.data, weight.quant_state).float()
    exact = with_adapters(exact)
    exact.load_state_dict({name: value for name, value in model.state_dict().items() if ".lora_" in name}, strict=False)
    rows = batch(device)
    with attention(exact.get_base_model(), SEGMENTS), attention(model.get_base_model(), SEGMENTS):
        supervised_loss(exact, rows).backward()
        wanted = gradients(exact)
        with torch.autocast(device, torch.bfloat16):
            supervised_loss(model, rows).backward()
            plain = gradients(model)
            model.zero_grad()
            engine = FusedEngine(model, checkpoint=True)
            engine.loss(rows).backward()

    def error(got: dict[str, torch.Tensor]) -> float:
        return sum(((got[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted) / len(wanted)

    assert error(gradients(model)) < 1.25 * error(plain) < 0.1


@pytest.mark.parametrize("double_quant", [False, True])
def test_an_nf4_base(tmp_path: Any, double_quant: bool) -> None:
    assert_nf4_as_exact_as_peft(tmp_path, double_quant, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_on_a_gpu_in_float32(family: str, checkpoint: bool) -> None:
    model = adapted(CONFIGS[family], dtype=torch.float32, device="cuda")
    compare(model, checkpoint=checkpoint, tolerance=1e-3, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("double_quant", [False, True])
def test_an_nf4_base_on_a_gpu(tmp_path: Any, double_quant: bool) -> None:
    assert_nf4_as_exact_as_peft(tmp_path, double_quant, "cuda")


@pytest.mark.parametrize("host", [False, True])
def test_chunks_of_the_loss_add_up(monkeypatch: pytest.MonkeyPatch, host: bool) -> None:
    monkeypatch.setattr(loss, "LOGITS_A_CHUNK", 97 * 7)
    monkeypatch.setattr(host_memory, "slices_of", lambda *_, rows: [slice(0, 40), slice(40, 80), slice(80, 97)])
    hidden, weight = 3 * torch.randn(50, 16, requires_grad=True), torch.randn(97, 16)
    targets = torch.randint(97, (50,))
    expected = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    (wanted,) = torch.autograd.grad(expected, hidden)
    head = HostHead(weight, torch.device("cpu")) if host else weight
    compute = streamed_loss if host else chunked_loss
    got, by_hidden = compute(hidden.detach(), head, targets, gradient=True)
    torch.testing.assert_close(got, expected.detach())
    torch.testing.assert_close(by_hidden, wanted)
    if not host:
        small = chunked_loss(hidden.detach(), weight, targets, gradient=True, chunk=3)
        torch.testing.assert_close(small, (got, by_hidden))
    again, nothing = compute(hidden.detach(), head, targets, gradient=False)
    torch.testing.assert_close(again, got)
    assert nothing is None


def test_dropping_follows_from_its_seed() -> None:
    x = torch.ones(1000, 10)
    assert torch.equal(drop(x, 0.3, 7), drop(x, 0.3, 7))
    assert not torch.equal(drop(x, 0.3, 7), drop(x, 0.3, 8))
    assert drop(x, 0.3, 7).mean().item() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(drop(x, 0.3, 7).unique(), torch.tensor([0, 1 / 0.7]))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: AutoModelForCausalLM.from_config(CONFIGS["llama"]), "full fine-tuning"),
        (lambda: with_adapters(AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2))), "gpt2"),
        (lambda: adapted(CONFIGS["llama"], dtype=torch.float32, use_dora=True), "DoRA"),
        (lambda: adapted(CONFIGS["llama"], dtype=torch.float16), "float16"),
        (lambda: adapted(CONFIGS["llama"], target_modules=["q_proj", "embed_tokens"]), "embed_tokens has an adapter"),
        (lambda: adapted(CONFIGS["llama"], modules_to_save=["lm_head"]), "the head"),
    ],
)
def test_what_is_left_to_the_models_own_layers(model: Any, said: str) -> None:
    assert said in why_not_fused(model())


@pytest.mark.parametrize("offload", [["layers"], ["embedding", "head"], ["checkpoints", "layers", "embedding", "head"]])
@pytest.mark.parametrize("tied", [False, True])
def test_what_lies_in_host_memory_changes_nothing(offload: list[str], tied: bool) -> None:
    rows, results = batch(), []
    for parts in ([], offload):
        config = LlamaConfig(**{**SHAPE, "hidden_size": 128}, attention_bias=True, tie_word_embeddings=tied)
        model = adapted(config, dtype=torch.float32)
        with attention(model.get_base_model(), SEGMENTS):
            engine = FusedEngine(model, checkpoint=True, offload=parts)
            for _ in range(2):
                got = engine.loss(rows)
                got.backward()
        with torch.no_grad(), attention(model.get_base_model(), "sdpa"):
            logits = model.eval()(input_ids=rows["input_ids"], use_cache=False).logits
        results.append((got, gradients(model), logits))
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[1][2], results[0][2])


def test_a_small_update_is_not_rounded_away_in_bfloat16() -> None:
    """W x is some hundred times what an adapter adds after its first steps. peft rounds W x before it adds, and most is lost."""
    torch.manual_seed(3)
    config = LlamaConfig(**{**SHAPE, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8})
    base = AutoModelForCausalLM.from_config(config)
    for parameter in base.parameters():
        nn.init.normal_(parameter, 0, 0.05)
    model = with_adapters(base, r=64, lora_alpha=16).to(torch.bfloat16)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            nn.init.normal_(parameter, 0, 0.025)
        elif "lora_B" in name:
            parameter.data = torch.randn(parameter.shape).sign().mul(1e-4).bfloat16()
    x = torch.randn(64, 512).bfloat16()
    a, b = (getattr(layer, name)["default"].weight.double() for name in ("lora_A", "lora_B"))
    exact = layer.scaling["default"] * (x.double() @ a.t() @ b.t())

    def arrived(with_adapter: torch.Tensor) -> float:
        update = with_adapter.double() - layer.base_layer(x).double()
        return float((update * exact).sum() / exact.square().sum())

    group = FusedEngine(model, checkpoint=False).layers[0].qkv
    buffer = group.new_input(x)
    buffer[:, :512] = x
    with torch.no_grad():
        fused, _ = group.forward(buffer)
        assert arrived(fused[:, group.outputs[0]]) > 0.8
        assert arrived(layer(x)) < 0.4
