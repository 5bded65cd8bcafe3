"""Root-mean-square normalisation, alone or fused with a residual addition; one program per row.

Rounds where the reference rounds: the sum with the residual and the normalised value, before the
weight is applied.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `weight * x / rms(x)`. x: [..., n], rows contiguous; weight: broadcastable to x."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = _as_rows(x)
    _launch(rows, rows, weight, out, out, eps, add=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `(rms_norm(x + residual), x + residual)` in one pass."""
    out, total = torch.empty_like(x), torch.empty_like(x)
    _launch(_as_rows(x.contiguous()), residual.contiguous(), weight, out, total, eps, add=True)
    return out, total


def _as_rows(x: Tensor) -> Tensor:
    """[outer, inner, n] with contiguous rows; a view where x is [rows, n] or [tokens, heads, n]."""
    if x.dim() == 3 and x.stride(2) == 1:
        return x
    if x.dim() == 2 and x.stride(1) == 1:
        return x[:, None]
    return x.reshape(-1, 1, x.shape[-1]).contiguous()


def _launch(
    x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, total: Tensor, eps: float, add: bool
) -> None:
    outer, inner, n = x.shape
    if not outer * inner:
        return
    block = triton.next_power_of_2(n)
    _rms_norm_kernel[(outer * inner,)](
        x,
        residual,
        weight.contiguous(),
        out,
        total,
        x.stride(0),
        x.stride(1),
        inner,
        weight.numel() // n,
        eps,
        N=n,
        BLOCK=block,
        ADD=add,
        num_warps=min(16, max(1, block // 512)),
    )


@triton.jit
def _rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    total,
    outer_stride,
    inner_stride,
    inner,
    weight_rows,
    eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < N
    start = (row // inner) * outer_stride + (row % inner) * inner_stride
    values = tl.load(x + start + columns, mask=inside, other=0.0)
    if ADD:
        other = tl.load(residual + row * N + columns, mask=inside, other=0.0)
        values = (values.to(tl.float32) + other.to(tl.float32)).to(values.dtype)
        tl.store(total + row * N + columns, values, mask=inside)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / N + eps)
    normed = (wide * scale).to(values.dtype)
    factor = tl.load(weight + (row % weight_rows) * N + columns, mask=inside, other=0.0)
    result = normed.to(tl.float32) * factor.to(tl.float32)
    tl.store(out + row * N + columns, result.to(values.dtype), mask=inside)
