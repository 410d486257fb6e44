"""The plain twins against autograd in float64; on a GPU the Triton kernels against the plain twins (tests marked `gpu`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from course_lib.training import kernels
from course_lib.training.kernels import (
    add_rms_norm,
    cross_entropy_,
    dequantise_nf4,
    put_beside,
    rms_norm_backward,
    rotate,
    swiglu,
    swiglu_backward_,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def test_rms_norm_and_its_gradient() -> None:
    x, y, grad, around = (torch.randn(7, 24) for _ in range(4))
    weight = torch.randn(24)
    total, normed, rstd = add_rms_norm(x, y, weight, 1e-6)
    leaf = (x + y).requires_grad_()
    torch.testing.assert_close(total, leaf.detach())
    torch.testing.assert_close(normed, rms_norm(leaf, weight).detach())
    (rms_norm(leaf, weight) * grad + leaf * around).sum().backward()
    by_x, again = rms_norm_backward(grad, total, weight, rstd, around)
    torch.testing.assert_close(by_x, leaf.grad)
    torch.testing.assert_close(again, normed)


def test_blocks_are_put_on_the_diagonal() -> None:
    blocks = [torch.randn(rows, 4) for rows in (5, 2, 9)]
    out = torch.full((16, 20), 7.0)[:, :12]
    put_beside(torch.cat(blocks), torch.tensor([0] * 5 + [1] * 2 + [2] * 9, dtype=torch.int32), out)
    torch.testing.assert_close(out, torch.block_diag(*blocks))


def test_without_a_second_addend_the_sum_is_the_input_itself() -> None:
    x = torch.randn(3, 8)
    assert add_rms_norm(x, None, torch.ones(8), 1e-6)[0] is x


def test_turning_back_undoes_turning_and_in_place_is_the_same() -> None:
    angles = torch.randn(5, 4).repeat(1, 2)
    x, out, back = torch.randn(5, 30).unflatten(1, (3, 10))[..., :8], torch.empty(5, 3, 8), torch.empty(5, 3, 8)
    rotate(x, out, angles.cos(), angles.sin())
    rotate(out, back, angles.cos(), angles.sin(), back=True)
    torch.testing.assert_close(back, x)
    rotate(x, x, angles.cos(), angles.sin())
    torch.testing.assert_close(x, out)


def test_swiglu_and_its_gradient() -> None:
    gate_up, grad = torch.randn(5, 12, requires_grad=True), torch.randn(5, 6)
    expected = F.silu(gate_up[:, :6]) * gate_up[:, 6:]
    expected.backward(grad)
    torch.testing.assert_close(swiglu(gate_up.detach()), expected.detach())
    over, hidden = gate_up.detach().clone(), grad.clone()
    swiglu_backward_(over, hidden)
    torch.testing.assert_close(over, gate_up.grad)
    torch.testing.assert_close(hidden, expected.detach())


def test_cross_entropy_and_its_gradient() -> None:
    logits, targets = (torch.randn(9, 50) * 5).requires_grad_(), torch.randint(50, (9,))
    expected = F.cross_entropy(logits, targets, reduction="none")
    expected.sum().backward()
    over = logits.detach().clone()
    torch.testing.assert_close(cross_entropy_(over, targets), expected.detach())
    torch.testing.assert_close(over, logits.grad)


@pytest.mark.parametrize("nested", [True, False])
def test_nf4_is_read_as_bitsandbytes_reads_it(nested: bool) -> None:
    assert_nf4_as_bitsandbytes("cpu", nested)


def assert_nf4_as_bitsandbytes(device: str, nested: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(256, 128, device=device, dtype=torch.bfloat16)
    packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=nested)
    inner = None
    if nested:
        inner = (state.state2.code, state.state2.absmax, state.offset.expand(len(state.state2.absmax)).contiguous())
    out = torch.empty_like(weight)
    dequantise_nf4(packed.flatten(), state.absmax, inner, state.code, out)
    strided = out.new_empty(256, 192)[:, :128]
    dequantise_nf4(packed.flatten(), state.absmax, inner, state.code, strided)
    assert torch.equal(strided, out)
    torch.testing.assert_close(out, dequantize_4bit(packed, state), rtol=1e-2, atol=1e-6)  # one rounding may differ
    assert (out == dequantize_4bit(packed, state)).float().mean() > 0.999


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Call a function without its kernel, on copies of its arguments."""

    def plain(function: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[Any, list[Any]]:
        copies = [argument.clone() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "_on_gpu", lambda _: False)
            return function(*copies, **named), copies

    return plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [4096, 1000])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_every_kernel_equals_its_plain_twin(twin: Callable[..., Any], dtype: torch.dtype, width: int) -> None:
    def close(one: torch.Tensor, other: torch.Tensor) -> None:
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error < (1e-6 if dtype == torch.float32 else 1e-3)

    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=dtype)  # noqa: E731
    x, y, grad, around, weight = make(77, width), make(77, width), make(77, width), make(77, width), make(width)
    for second in (y, None):
        made = add_rms_norm(x, second, weight, 1e-6)
        for one, other in zip(made, twin(add_rms_norm, x, second, weight, 1e-6)[0], strict=True):
            close(one, other)
        strided = make(77, width + 64)[:, :width]
        add_rms_norm(x, second, weight, 1e-6, out=strided)
        close(strided, made[1])
    for beside in (around, None):
        backward = rms_norm_backward(grad, x, weight, made[2], beside)
        for one, other in zip(backward, twin(rms_norm_backward, grad, x, weight, made[2], beside)[0], strict=True):
            close(one, other)
        strided = make(77, width + 64)[:, :width]
        rms_norm_backward(grad, x, weight, made[2], beside, out=strided)
        close(strided, backward[0])
    blocks, owner = make(width, 24), torch.randint(3, (width,), device="cuda", dtype=torch.int32)
    diagonal = make(width, 100)[:, :72]
    put_beside(blocks, owner, diagonal)
    close(diagonal, twin(put_beside, blocks, owner, make(width, 72))[1][2])
    heads = make(77, 7 * 64)[:, 64:].unflatten(1, (6, 64))
    cos, sin = (make(77, 32).repeat(1, 2) for _ in range(2))
    for back in (False, True):
        out = torch.empty_like(heads)
        rotate(heads, out, cos, sin, back=back)
        close(out, twin(rotate, heads, torch.empty_like(heads), cos, sin, back=back)[1][1])
    gate_up, hidden = make(77, 2 * width), make(77, width)
    close(swiglu(gate_up), twin(swiglu, gate_up)[0])
    _, (by_gate_up, product) = twin(swiglu_backward_, gate_up, hidden)
    swiglu_backward_(gate_up, hidden)
    close(gate_up, by_gate_up)
    close(hidden, product)
    logits, targets = make(77, 10 * width) * 3, torch.randint(10 * width, (77,), device="cuda")
    losses, (by_logits, _) = twin(cross_entropy_, logits, targets)
    close(cross_entropy_(logits, targets), losses)
    close(logits, by_logits)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_nf4_on_the_gpu_is_read_as_bitsandbytes_reads_it(nested: bool) -> None:
    assert_nf4_as_bitsandbytes("cuda", nested)
