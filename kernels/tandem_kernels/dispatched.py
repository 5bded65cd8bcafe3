"""The operations as callers see them: each goes to what was chosen for its first tensor's device.

Shapes and meaning: see the reference of the same name.
"""

from __future__ import annotations

from torch import Tensor

from tandem_kernels.implementation import operations
from tandem_kernels.ragged_batch import RaggedBatch


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `tandem_kernels.rms_norm`."""
    return operations(x.device.type).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `tandem_kernels.rms_norm`."""
    return operations(x.device.type).add_rms_norm(x, residual, weight, eps)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `tandem_kernels.rotary`."""
    return operations(x.device.type).apply_rotary(x, cos, sin)


def kv_write(
    key_cache: Tensor, value_cache: Tensor, slots: Tensor, key: Tensor, value: Tensor
) -> None:
    """See `tandem_kernels.kv_write`."""
    operations(key.device.type).kv_write(key_cache, value_cache, slots, key, value)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: RaggedBatch,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """See `tandem_kernels.paged_attention`."""
    run = operations(query.device.type).paged_attention
    return run(query, key_cache, value_cache, batch, scale, window)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `tandem_kernels.silu_mul`."""
    return operations(gate_up.device.type).silu_mul(gate_up)


def kv_pack(
    kv: Tensor, first_layer: int, num_layers: int, slots: Tensor, out: Tensor | None = None
) -> Tensor:
    """See `tandem_kernels.kv_pack`."""
    return operations(kv.device.type).kv_pack(kv, first_layer, num_layers, slots, out)


def kv_unpack(
    kv: Tensor, first_layer: int, num_layers: int, slots: Tensor, staging: Tensor
) -> None:
    """See `tandem_kernels.kv_pack`."""
    operations(kv.device.type).kv_unpack(kv, first_layer, num_layers, slots, staging)


def gumbel_noise(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """See `tandem_kernels.gumbel`."""
    return operations(seeds.device.type).gumbel_noise(seeds, positions, token_ids)


def apply_penalties(
    logits: Tensor,
    token_ids: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """See `tandem_kernels.penalties`."""
    run = operations(logits.device.type).apply_penalties
    run(logits, token_ids, output_counts, repetition, presence, frequency)


def truncate_logits(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> None:
    """See `tandem_kernels.truncation`."""
    operations(logits.device.type).truncate_logits(logits, top_k, top_p, min_p)
