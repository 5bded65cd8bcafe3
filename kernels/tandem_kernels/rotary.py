"""Rotary position embedding in the half-split layout of Hugging Face checkpoints.

Source: Su et al., "RoFormer" (2021). Element i of the first half of a head is rotated with element
i of the second half. Which frequencies a model uses is its own business, not this file's.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(
    positions: Tensor, inverse_frequencies: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each [tokens, 1, head_dim / 2], computed in float32 and given as `dtype`.

    positions: int64 [tokens]; inverse_frequencies: float32 [head_dim / 2].
    """
    angles = positions[:, None].float() * inverse_frequencies
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x rotated. x: [tokens, heads, head_dim]; cos, sin: as `rotary_tables` returns them."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
