"""The gated activation of a SwiGLU feed-forward block.

Source: Shazeer, "GLU Variants Improve Transformer" (2020).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return `silu(gate) * up`. gate_up: [..., 2 * n], gate first; result: [..., n]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up
