"""Element-wise parts of a decoder layer, each one pass over memory: a Triton kernel on a GPU, plain PyTorch elsewhere.

Derived from the formulas alone: RMSNorm (Zhang and Sennrich 2019), rotary embedding (Su et al. 2021), SwiGLU (Shazeer 2020),
softmax cross entropy. Everything is computed in float32 and rounded once, on the way out. The plain twin of each is what
`tests/training/test_kernels.py` checks against autograd, and what runs where Triton is not installed.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU builds of PyTorch come without
    triton = None


def _on_gpu(tensor: torch.Tensor) -> bool:
    return triton is not None and tensor.is_cuda


def add_rms_norm(
    x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor, eps: float, *, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`x + y` and its RMSNorm, `weight * s / sqrt(mean(s²) + eps)`.

    Args:
        x, y: shape (rows, width), contiguous; y may be None.
        weight: shape (width,).
        out: where the norm goes, of any row stride.

    Returns:
        The sum (x itself without y), the norm, both in x's type; and 1 / sqrt(mean(s²) + eps), float32, shape (rows,).
    """
    if _on_gpu(x):
        rows, width = x.shape
        total = x if y is None else torch.empty_like(x)
        out = torch.empty_like(x) if out is None else out
        rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
        _add_rms_norm_kernel[(rows,)](
            x, y, weight, total, out, rstd, width, out.stride(0), eps, has_y=y is not None, block=triton.next_power_of_2(width),
            num_warps=_warps(width),
        )  # fmt: skip
        return total, out, rstd
    total = x if y is None else x + y
    wide = total.float()
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    normed = (wide * rstd[:, None]).to(x.dtype) * weight
    return total, normed if out is None else out.copy_(normed), rstd


def rms_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    residual_grad: torch.Tensor | None,
    *,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient by the norm's input, plus the gradient that goes around the norm; and the norm's output once more.

    With n = x · rstd and g = grad · weight: rstd · (g - n · mean(g · n)) + residual_grad.

    Args:
        grad, x: shape (rows, width), contiguous.
        residual_grad, out: the same shape, of any row stride; out is where the gradient goes.

    Returns:
        Gradient and output, both shape (rows, width), in x's type.
    """
    if _on_gpu(x):
        rows, width = x.shape
        out, normed = torch.empty_like(x) if out is None else out, torch.empty_like(x)
        around = 0 if residual_grad is None else residual_grad.stride(0)
        _rms_norm_backward_kernel[(rows,)](
            grad, x, weight, rstd, residual_grad, out, normed, width, around, out.stride(0),
            has_residual=residual_grad is not None, block=triton.next_power_of_2(width), num_warps=_warps(width),
        )  # fmt: skip
        return out, normed
    n = x.float() * rstd[:, None]
    g = grad.float() * weight.float()
    by = rstd[:, None] * (g - n * (g * n).mean(-1, keepdim=True))
    if residual_grad is not None:
        by = by + residual_grad.float()
    return by.to(x.dtype) if out is None else out.copy_(by), n.to(x.dtype) * weight


def rotate(
    source: torch.Tensor, target: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool = False
) -> None:
    """Rotary embedding from `source` into `target`, which may be the same: pairs (i, i + head_dim / 2) turn by their angle.

    Args:
        source, target: shape (rows, heads, head_dim), any row stride.
        cos, sin: shape (rows, head_dim), both halves alike.
        back: turn the other way, which is what the gradient does.
    """
    rows, heads, dim = source.shape
    half = dim // 2
    if _on_gpu(source):
        _rotate_kernel[(rows,)](
            source, target, cos, sin, source.stride(0), source.stride(1), target.stride(0), target.stride(1),
            cos.stride(0), heads, half, back_turn=back, head_block=triton.next_power_of_2(heads),
            half_block=triton.next_power_of_2(half), num_warps=_warps(heads * half),
        )  # fmt: skip
        return
    c, s = cos[:, None, :half].float(), sin[:, None, :half].float()
    s = -s if back else s
    first, second = source[..., :half].float(), source[..., half:].float()
    turned = torch.cat([first * c - second * s, second * c + first * s], dim=-1)
    target.copy_(turned)


def put_beside(b: torch.Tensor, owner: torch.Tensor, out: torch.Tensor) -> None:
    """Stacked blocks as a block-diagonal matrix: row i of `b` goes to columns owner[i] · rank and on, the rest of `out` is zero.

    Args:
        b: shape (rows, rank), contiguous.
        owner: int32, shape (rows,): which block a row is of.
        out: shape (rows, blocks · rank), of any row stride.
    """
    rows, rank = b.shape
    blocks = out.shape[1] // rank
    if _on_gpu(b):
        size = triton.next_power_of_2(out.shape[1])
        _put_beside_kernel[(triton.cdiv(rows, 16),)](b, owner, out, out.stride(0), rows, out.shape[1], rank, block=size)
        return
    own = torch.arange(blocks, device=b.device)[None, :, None] == owner[:, None, None]
    out.copy_((own * b[:, None, :]).view(rows, -1))


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up for gate and up side by side, shape (rows, 2 · width): shape (rows, width)."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if _on_gpu(gate_up):
        out = gate_up.new_empty(rows, width)
        _swiglu_kernel[(rows, triton.cdiv(width, 1024))](gate_up, out, width, block=1024)
        return out
    gate, up = gate_up[:, :width].float(), gate_up[:, width:].float()
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def swiglu_backward_(gate_up: torch.Tensor, grad: torch.Tensor) -> None:
    """Gradients by gate and up written over `gate_up`, and silu(gate) · up once more written over `grad`.

    With σ = sigmoid(gate): d gate = grad · up · σ · (1 + gate · (1 - σ)), d up = grad · gate · σ.
    """
    rows, width = grad.shape
    if _on_gpu(grad):
        _swiglu_backward_kernel[(rows, triton.cdiv(width, 1024))](gate_up, grad, width, block=1024)
        return
    gate, up, by = gate_up[:, :width].float(), gate_up[:, width:].float(), grad.float()
    sigma = torch.sigmoid(gate)
    silu = gate * sigma
    made = by * up * sigma * (1 + gate * (1 - sigma)), by * silu, silu * up  # all read before one is written
    gate_up[:, :width], gate_up[:, width:], grad[:] = made


def cross_entropy_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy in nats of each row, float32, shape (rows,); its gradient, softmax - one-hot, written over `logits`.

    Args:
        logits: shape (rows, vocabulary).
        targets: int64, shape (rows,).
    """
    if _on_gpu(logits):
        losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        _cross_entropy_kernel[(len(logits),)](
            logits, targets, losses, logits.shape[1], logits.stride(0), block=4096, num_warps=16
        )
        return losses
    wide = logits.float()  # logits themselves in float32
    log_normaliser = wide.logsumexp(-1, keepdim=True)
    losses = log_normaliser[:, 0] - wide.gather(1, targets[:, None])[:, 0]
    wide.sub_(log_normaliser).exp_()
    wide.scatter_add_(1, targets[:, None], wide.new_full((len(targets), 1), -1.0))
    logits.copy_(wide)
    return losses


def dequantise_nf4(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    code: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Values of 4-bit weights in blocks of 64 (Dettmers et al. 2023), with their doubly quantised scales, in one launch.

    Args:
        packed: uint8, shape (weights / 2,): two weights a byte, the first in the high half.
        absmax: scale of each block, shape (weights / 64,): float32, or uint8 where `nested` says how to read it:
            its code, float32, shape (256,); and factor and offset, float32, one for each 256 blocks.
        code: float32, shape (16,): the value of each of the 16 numbers.
        out: any float type, shape (rows, columns) of as many elements as there are weights. Of any row stride where whole
            blocks make a row; else contiguous.
    """
    blocks = out.numel() // 64
    a_row, stride = (out.shape[1] // 64, out.stride(0)) if out.shape[1] % 64 == 0 else (1, 64)
    if _on_gpu(out):
        parts = nested or (absmax, absmax, absmax)
        _dequantise_nf4_kernel[(triton.cdiv(blocks, 64),)](
            packed, absmax, *parts, code, out, blocks, a_row, stride, nested=nested is not None, group=256, rows=64
        )
        return
    if nested is not None:
        levels, factor, offset = nested
        group = torch.arange(blocks, device=out.device) // 256
        absmax = levels[absmax.long()] * factor[group] + offset[group]
    values = torch.stack([code[(packed >> 4).long()], code[(packed & 15).long()]], dim=-1)
    out.copy_((values.view(blocks, 64) * absmax[:, None]).view(out.shape))


def _warps(width: int) -> int:
    return 16 if width > 8192 else 8 if width > 2048 else 4


if triton is not None:

    @triton.jit
    def _add_rms_norm_kernel(
        x, y, weight, total, out, rstd, width, out_row, eps, has_y: tl.constexpr, block: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, block)
        inside = at < width
        s = tl.load(x + row * width + at, mask=inside, other=0.0)
        if has_y:
            s += tl.load(y + row * width + at, mask=inside, other=0.0)
            tl.store(total + row * width + at, s, mask=inside)
        wide = s.to(tl.float32)
        scale = 1 / tl.sqrt(tl.sum(wide * wide, 0) / width + eps)
        tl.store(rstd + row, scale)
        w = tl.load(weight + at, mask=inside, other=0.0)
        tl.store(out + row * out_row + at, (wide * scale).to(s.dtype) * w, mask=inside)

    @triton.jit
    def _rms_norm_backward_kernel(
        grad, x, weight, rstd, residual, out, normed, width, residual_row, out_row,
        has_residual: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, block)
        inside = at < width
        scale = tl.load(rstd + row)
        w = tl.load(weight + at, mask=inside, other=0.0)
        n = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32) * scale
        g = tl.load(grad + row * width + at, mask=inside, other=0.0).to(tl.float32) * w.to(tl.float32)
        by = scale * (g - n * (tl.sum(g * n, 0) / width))
        if has_residual:
            by += tl.load(residual + row * residual_row + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * out_row + at, by.to(w.dtype), mask=inside)
        tl.store(normed + row * width + at, n.to(w.dtype) * w, mask=inside)

    @triton.jit
    def _rotate_kernel(
        source, target, cos, sin, source_row, source_head, target_row, target_head, angle_row, heads, half,
        back_turn: tl.constexpr, head_block: tl.constexpr, half_block: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        head, at = tl.arange(0, head_block)[:, None], tl.arange(0, half_block)[None, :]
        inside = (head < heads) & (at < half)
        c = tl.load(cos + row * angle_row + at, mask=at < half, other=0.0).to(tl.float32)
        s = tl.load(sin + row * angle_row + at, mask=at < half, other=0.0).to(tl.float32)
        if back_turn:
            s = -s
        start = source + row * source_row + head * source_head + at
        first = tl.load(start, mask=inside, other=0.0)
        second = tl.load(start + half, mask=inside, other=0.0)
        end = target + row * target_row + head * target_head + at
        tl.store(end, (first.to(tl.float32) * c - second.to(tl.float32) * s).to(first.dtype), mask=inside)
        tl.store(end + half, (second.to(tl.float32) * c + first.to(tl.float32) * s).to(first.dtype), mask=inside)

    @triton.jit
    def _put_beside_kernel(b, owner, out, out_row, rows, width, rank, block: tl.constexpr):
        row = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)
        at = tl.arange(0, block)[None, :]
        inside = (row < rows)[:, None] & (at < width)
        first = tl.load(owner + row, mask=row < rows, other=0)[:, None] * rank
        own = inside & (at >= first) & (at < first + rank)
        values = tl.load(b + row[:, None] * rank + at - first, mask=own, other=0.0)
        tl.store(out + row[:, None] * out_row + at, values, mask=inside)

    @triton.jit
    def _swiglu_kernel(gate_up, out, width, block: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * block + tl.arange(0, block)
        inside = at < width
        gate = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * width + width + at, mask=inside, other=0.0)
        tl.store(out + row * width + at, (gate * tl.sigmoid(gate) * up.to(tl.float32)).to(up.dtype), mask=inside)

    @triton.jit
    def _swiglu_backward_kernel(gate_up, grad, width, block: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * block + tl.arange(0, block)
        inside = at < width
        start = gate_up + row * 2 * width + at
        raw = tl.load(start, mask=inside, other=0.0)
        gate, up = raw.to(tl.float32), tl.load(start + width, mask=inside, other=0.0).to(tl.float32)
        by = tl.load(grad + row * width + at, mask=inside, other=0.0).to(tl.float32)
        sigma = tl.sigmoid(gate)
        tl.store(start, (by * up * sigma * (1 + gate * (1 - sigma))).to(raw.dtype), mask=inside)
        tl.store(start + width, (by * gate * sigma).to(raw.dtype), mask=inside)
        tl.store(grad + row * width + at, (gate * sigma * up).to(raw.dtype), mask=inside)

    @triton.jit
    def _cross_entropy_kernel(logits, targets, losses, width, stride, block: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        start = logits + row * stride
        largest, total = tl.full((), float("-inf"), tl.float32), tl.zeros((), tl.float32)
        for first in range(
            0, width, block
        ):  # maximum and sum of exponentials in one pass (Milakov and Gimelshein 2018)
            at = first + tl.arange(0, block)
            part = tl.load(start + at, mask=at < width, other=float("-inf")).to(tl.float32)
            new = tl.maximum(largest, tl.max(part, 0))
            total = total * tl.exp(largest - new) + tl.sum(tl.exp(part - new), 0)
            largest = new
        target = tl.load(targets + row)
        normaliser = largest + tl.log(total)
        tl.store(losses + row, normaliser - tl.load(start + target).to(tl.float32))
        tl.debug_barrier()  # the target's logit is read before it is written over
        for first in range(0, width, block):
            at = first + tl.arange(0, block)
            part = tl.load(start + at, mask=at < width, other=float("-inf"))
            by = tl.exp(part.to(tl.float32) - normaliser) - tl.where(at == target, 1.0, 0.0)
            tl.store(start + at, by.to(part.dtype), mask=at < width)

    @triton.jit
    def _dequantise_nf4_kernel(
        packed, absmax, absmax_code, absmax_scale, absmax_offset, code, out, blocks, a_row, stride,
        nested: tl.constexpr, group: tl.constexpr, rows: tl.constexpr,
    ):  # fmt: skip
        block = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)  # of 64 weights, which share one absmax
        inside = block < blocks
        if nested:
            scale = tl.load(absmax_code + tl.load(absmax + block, mask=inside, other=0).to(tl.int32))
            scale = scale * tl.load(absmax_scale + block // group, mask=inside, other=0.0)
            scale += tl.load(absmax_offset + block // group, mask=inside, other=0.0)
        else:
            scale = tl.load(absmax + block, mask=inside, other=0.0)
        byte = tl.load(packed + block[:, None] * 32 + tl.arange(0, 32)[None, :], mask=inside[:, None], other=0)
        high = tl.load(code + (byte >> 4).to(tl.int32)) * scale[:, None]
        low = tl.load(code + (byte & 15).to(tl.int32)) * scale[:, None]
        weights = tl.reshape(tl.join(high, low), (rows, 64))
        at = (block // a_row * stride + block % a_row * 64)[:, None] + tl.arange(0, 64)[None, :]
        tl.store(out + at, weights.to(out.dtype.element_ty), mask=inside[:, None])
