"""Norms, rotary embedding, gated activation, and moving KV in and out of the cache."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tandem_kernels import (
    add_rms_norm,
    apply_rotary,
    kv_pack,
    kv_unpack,
    kv_write,
    rms_norm,
    rotary_tables,
    silu_mul,
)


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 0.05), (torch.float16, 0.005)]
)
def test_rms_norm(dtype: torch.dtype, error: float) -> None:
    x, residual = torch.randn((2, 5, 24), dtype=torch.float64)
    weight = torch.randn(24, dtype=torch.float64)
    expected = functional.rms_norm(x + residual, (24,), weight, 1e-5)
    normed, total = add_rms_norm(x.to(dtype), residual.to(dtype), weight.to(dtype), 1e-5)
    assert normed.dtype == total.dtype == dtype
    torch.testing.assert_close(total.double(), x + residual, atol=error, rtol=error)
    torch.testing.assert_close(normed.double(), expected, atol=error, rtol=error)
    assert torch.equal(rms_norm(total, weight.to(dtype), 1e-5), normed)


def test_rotary_turns_pairs_by_position() -> None:
    positions = torch.tensor([0, 1, 1000])
    frequencies = torch.tensor([1.0, 0.01])
    cos, sin = rotary_tables(positions, frequencies, torch.float32)
    x = torch.randn(3, 2, 4)
    turned = apply_rotary(x, cos, sin)
    pairs = torch.complex(x[..., :2].double(), x[..., 2:].double())
    angles = positions[:, None, None] * frequencies.double()
    expected = pairs * torch.polar(torch.ones_like(angles), angles)
    actual = torch.complex(turned[..., :2].double(), turned[..., 2:].double())
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    assert torch.equal(turned[0], x[0])


def test_silu_mul() -> None:
    gate, up = torch.randn(2, 3, 7)
    expected = gate * gate.sigmoid() * up
    torch.testing.assert_close(silu_mul(torch.cat((gate, up), -1)), expected)


def test_kv_write_changes_the_named_slots_only() -> None:
    caches = torch.zeros(2, 3, 4, 2, 5)
    key, value = torch.randn(2, 3, 2, 5)
    slots = torch.tensor([11, 0, 6])
    kv_write(*caches, slots, key, value)
    flat = caches.flatten(1, 2)
    assert torch.equal(flat[0, slots], key)
    assert torch.equal(flat[1, slots], value)
    others = [slot for slot in range(12) if slot not in slots.tolist()]
    assert not flat[:, others].any()


def test_kv_pack_and_unpack_are_inverse() -> None:
    source = torch.randn(4, 2, 3, 4, 2, 5)
    target = torch.zeros(3, 4, 2, 4, 2, 5).permute(1, 2, 0, 3, 4, 5)  # block by block
    slots, elsewhere = torch.tensor([9, 2, 3]), torch.tensor([0, 10, 5])
    packed = kv_pack(source, 1, 2, slots)
    assert packed.shape == (2, 2, 3, 2, 5)
    assert packed.is_contiguous()
    assert torch.equal(packed, source.flatten(2, 3)[1:3, :, slots])
    kv_unpack(target, 1, 2, elsewhere, packed)
    assert torch.equal(target.flatten(2, 3)[1:3, :, elsewhere], packed)
    others = [slot for slot in range(12) if slot not in elsewhere.tolist()]
    assert not target.flatten(2, 3)[:, :, others].any()
    assert not target[0].any()
    assert not target[3].any()


def test_kv_pack_fills_the_given_buffer() -> None:
    source, out = torch.randn(4, 2, 3, 4, 2, 5), torch.empty(1, 2, 2, 2, 5)
    packed = kv_pack(source, 3, 1, torch.tensor([4, 1]), out)
    assert packed.data_ptr() == out.data_ptr()
    assert torch.equal(out, source.flatten(2, 3)[3:, :, [4, 1]])
