"""KV transfers as the engine thread sees them: events that cross over, and holds on blocks.

Transfers run in threads of their own; what they report is posted to the engine thread together with
the peer that it concerns. Nothing here moves a byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, NamedTuple, Protocol, TypeVar

from tandem.core.sequence import Sequence
from tandem.kvcache.block_pool import BlockPool
from tandem.worker.engine_loop import EngineLoop

Peer = TypeVar("Peer")
PeerIn = TypeVar("PeerIn", contravariant=True)


class LandedPiece(NamedTuple):
    """KV of tokens [start, start + num_tokens) in a group of layers is in its blocks."""

    leg_id: int
    first_layer: int
    num_layers: int
    start: int
    num_tokens: int
    seconds: float
    num_bytes: int


class TransferHandler(Protocol[PeerIn]):
    """`transfer.TransferEvents` in the engine thread, with the peer they concern."""

    def piece_landed(self, peer: PeerIn, piece: LandedPiece) -> None: ...

    def sends_closed(self, peer: PeerIn, leg_id: int, error: str | None) -> None: ...

    def receives_closed(self, peer: PeerIn, leg_id: int) -> None: ...

    def link_failed(self, peer: PeerIn, leg_ids: tuple[int, ...], reason: str) -> None: ...


class PostedEvents(Generic[Peer]):
    """The `TransferEvents` of one peer: posts each to the engine thread."""

    def __init__(self, loop: EngineLoop, handler: TransferHandler[Peer], peer: Peer) -> None:
        self._post = loop.post
        self._handler = handler
        self._peer = peer

    def piece_landed(
        self, leg_id: int, first_layer: int, num_layers: int, start: int, num_tokens: int,
        seconds: float, num_bytes: int,
    ) -> None:  # fmt: skip
        piece = LandedPiece(leg_id, first_layer, num_layers, start, num_tokens, seconds, num_bytes)
        self._post(self._handler.piece_landed, self._peer, piece)

    def sends_closed(self, leg_id: int, error: str | None) -> None:
        self._post(self._handler.sends_closed, self._peer, leg_id, error)

    def receives_closed(self, leg_id: int) -> None:
        self._post(self._handler.receives_closed, self._peer, leg_id)

    def link_failed(self, leg_ids: Iterable[int], reason: str) -> None:
        self._post(self._handler.link_failed, self._peer, tuple(leg_ids), reason)


class TransferHolds:
    """The holds that transfers have on blocks, one per leg and direction. Engine thread."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._blocks: dict[str, tuple[int, ...]] = {}

    def take(self, peer: str, leg_id: int, direction: str, sequence: Sequence) -> None:
        """Keep every block of a sequence from being reused until `release`."""
        holder = _holder(peer, leg_id, direction)
        blocks = tuple(sequence.block_table)
        self._pool.hold_for_transfer(blocks, holder)
        self._blocks[holder] = blocks

    def release(self, peer: str, leg_id: int, direction: str) -> None:
        """Let go; a leg that never took this hold is no error, as it may end before its grant."""
        holder = _holder(peer, leg_id, direction)
        blocks = self._blocks.pop(holder, None)
        if blocks is not None:
            self._pool.release_transfer(blocks, holder)


def _holder(peer: str, leg_id: int, direction: str) -> str:
    return f"transfer:{peer}:{leg_id}:{direction}"
