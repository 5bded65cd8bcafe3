"""The gated activation of a SwiGLU feed-forward block in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return `silu(gate) * up`. gate_up: [..., 2 * n], gate first; result: [..., n]."""
    n = gate_up.shape[-1] // 2
    gate_up = gate_up.contiguous()
    out = torch.empty((*gate_up.shape[:-1], n), dtype=gate_up.dtype, device=gate_up.device)
    rows = out.numel() // n if n else 0
    if rows:
        _silu_mul_kernel[(rows, triton.cdiv(n, _BLOCK))](gate_up, out, n, BLOCK=_BLOCK, num_warps=4)
    return out


@triton.jit
def _silu_mul_kernel(gate_up, out, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    gate = tl.load(gate_up + row * 2 * n + columns, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * n + n + columns, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    product = activated.to(tl.float32) * up.to(tl.float32)
    tl.store(out + row * n + columns, product.to(gate.dtype), mask=inside)
