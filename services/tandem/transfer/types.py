"""What goes in and out of a KV link: pieces, events, and the blocks that it reads and writes.

Data and protocols only; no threads, no sockets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


class KVBlocks(Protocol):
    """The paged KV tensors of one worker, as far as a link needs them."""

    kv: torch.Tensor
    """[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]."""

    def pack(
        self,
        first_layer: int,
        num_layers: int,
        slots: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Gather slots into a contiguous [num_layers, 2, n, num_kv_heads, head_dim].

        `out` may be host memory where the blocks are not; the copy is then queued.
        """
        ...

    def unpack(
        self, first_layer: int, num_layers: int, slots: torch.Tensor, staging: torch.Tensor
    ) -> None:
        """Scatter what `pack` gathered, here or into host memory, into slots."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """KV of tokens [start, start + len(slots)) in num_layers layers from first_layer on."""

    leg_id: int
    chunk: int
    first_layer: int
    num_layers: int
    start: int
    slots: torch.Tensor
    """int64, one slot per token; the caller holds their blocks until `sends_closed`."""
    ready: torch.cuda.Event | None = None
    """Recorded after the compute that wrote the piece; None when that has already finished."""


class TransferEvents(Protocol):
    """What a worker hears from its links.

    Called from transfer threads, and from the caller's own when nothing is left to wait for.
    Implementations must not block: they post to the engine's inbox.
    """

    def piece_landed(
        self,
        leg_id: int,
        first_layer: int,
        num_layers: int,
        start: int,
        num_tokens: int,
        seconds: float,
        nbytes: int,
    ) -> None:
        """A piece stands in its blocks. Once per piece, however often the link was rebuilt."""

    def sends_closed(self, leg_id: int, error: str | None) -> None:
        """No block of the leg is read any more. Once per leg; the transfer hold may go."""

    def receives_closed(self, leg_id: int) -> None:
        """No scatter touches, or will touch, the leg's blocks. Once per leg."""

    def link_failed(self, leg_ids: Sequence[int], reason: str) -> None:
        """These legs cannot go on over this link."""
