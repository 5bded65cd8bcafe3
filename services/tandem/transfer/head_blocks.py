"""Some heads of a worker's KV blocks, for a link that carries only those.

A token's heads lie one after the other, so a range of heads is a range of smaller slots: what packs
and scatters whole tokens packs and scatters heads as well, on every kind of device.
"""

from __future__ import annotations

from math import gcd

import torch

from tandem.kvcache.heads import HeadRange
from tandem.transfer.types import KVBlocks
from tandem_kernels import kv_pack, kv_unpack


class HeadBlocks:
    """`KVBlocks` over heads [first, first + num_heads) of other blocks, which stay as they are."""

    def __init__(self, blocks: KVBlocks, heads: HeadRange) -> None:
        """`heads` counts from the first head that these blocks hold."""
        self.kv = blocks.kv[..., heads.first : heads.first + heads.num_heads, :]
        held, head_dim = blocks.kv.shape[-2:]
        unit = gcd(gcd(heads.first, heads.num_heads), held)
        self._per_token = held // unit
        self._first = heads.first // unit
        self._units = torch.arange(heads.num_heads // unit, device=blocks.kv.device)
        layers, two, num_blocks, block_size = blocks.kv.shape[:4]
        shape = (layers, two, num_blocks, block_size * self._per_token, unit, head_dim)
        self._small = blocks.kv.view(shape)

    def pack(
        self,
        first_layer: int,
        num_layers: int,
        slots: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Gather slots into a contiguous [num_layers, 2, n, heads, head_dim]."""
        units = self._units_of(slots)
        if out is not None:
            out = out.view(num_layers, 2, len(units), *self._small.shape[4:])
        packed = kv_pack(self._small, first_layer, num_layers, units, out)
        return packed.view(num_layers, 2, len(slots), *self.kv.shape[-2:])

    def unpack(
        self, first_layer: int, num_layers: int, slots: torch.Tensor, staging: torch.Tensor
    ) -> None:
        """Scatter what `pack` gathered into slots; the other heads keep what they hold."""
        units = self._units_of(slots)
        packed = staging.view(num_layers, 2, len(units), *self._small.shape[4:])
        kv_unpack(self._small, first_layer, num_layers, units, packed)

    def _units_of(self, slots: torch.Tensor) -> torch.Tensor:
        return (slots[:, None] * self._per_token + self._first + self._units).flatten()


def head_blocks(blocks: KVBlocks, heads: HeadRange, held: HeadRange) -> KVBlocks:
    """The part of `blocks`, which hold the model's heads `held`, that has its heads `heads`."""
    if heads == held:
        return blocks
    return HeadBlocks(blocks, HeadRange(heads.first - held.first, heads.num_heads))
