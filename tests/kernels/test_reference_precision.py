"""The torch reference in bfloat16 against itself in float32, on the same bfloat16 inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from tandem_kernels import (
    RaggedBatch,
    apply_rotary,
    paged_attention,
    rms_norm,
    rotary_tables,
    silu_mul,
)

TOLERANCE = 2.0**-6
"""Relative to the largest value of the result: intermediate values are rounded as well."""


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).bfloat16()


def assert_near(half: Tensor, full: Tensor) -> None:
    assert half.dtype == torch.bfloat16
    assert full.dtype == torch.float32
    error = (half.float() - full).abs().max() / full.abs().max()
    assert error <= TOLERANCE, f"off by {error:.1e}"


def test_rms_norm_stays_near() -> None:
    x, weight = drawn(9, 64), drawn(64)
    assert_near(rms_norm(x, weight, 1e-6), rms_norm(x.float(), weight.float(), 1e-6))


def test_silu_mul_stays_near() -> None:
    x = drawn(9, 64)
    assert_near(silu_mul(x), silu_mul(x.float()))


def test_rotary_stays_near() -> None:
    x, positions = drawn(9, 3, 16), torch.arange(9) * 100
    frequencies = 1e4 ** -torch.linspace(0, 1, 8)
    half = apply_rotary(x, *rotary_tables(positions, frequencies, torch.bfloat16))
    assert_near(
        half, apply_rotary(x.float(), *rotary_tables(positions, frequencies, torch.float32))
    )


def test_paged_attention_stays_near() -> None:
    batch = RaggedBatch.build([[2, 0], [1, 3, 4]], [0, 38], [30, 2], 16)
    query, keys, values = drawn(32, 4, 16), drawn(5, 16, 2, 16), drawn(5, 16, 2, 16)
    half = paged_attention(query, keys, values, batch, 0.25)
    full = paged_attention(query.float(), keys.float(), values.float(), batch, 0.25)
    assert_near(half, full)
