"""Root-mean-square normalisation over the last dimension, alone or fused with a residual addition.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019). The mean is taken in
float32 and the result is rounded to the input's dtype before the weight is applied, as
`transformers` does, so that half-precision results agree with it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `weight * x / rms(x)`. x: [..., n], any float dtype; weight: broadcastable to x."""
    if x.dtype == torch.float32:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `(rms_norm(x + residual), x + residual)`: what the next block reads and carries on."""
    total = x + residual
    return rms_norm(total, weight, eps), total
