"""KV transfers as the engine thread sees them: what it asks for, and events that cross over.

Transfers run in threads of their own; what they report is posted to the engine thread together with
the peer that it concerns. Nothing here moves a byte. Invariant: the blocks that a leg's transfer
reads or writes are held from before it begins until it has closed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

from tandem.core.sequence import Sequence
from tandem.engine.engine import LayerGroup
from tandem.transfer import Piece, RankedTransfer
from tandem.worker.engine_loop import EngineLoop
from tandem.worker.runtime import WorkerRuntime

Direction = Literal["in", "out"]

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


class TransferPeer(Protocol):
    """Where KV comes from, or goes to."""

    @property
    def name(self) -> str: ...

    @property
    def transfer(self) -> RankedTransfer: ...


class TransferLeg(Protocol):
    """Whose KV it is."""

    @property
    def leg_id(self) -> int: ...

    @property
    def peer(self) -> TransferPeer: ...

    @property
    def sequence(self) -> Sequence: ...


class LegTransfers:
    """The transfers of every leg of a worker, out of its blocks and into them. Engine thread.

    There is one hold on a leg's blocks per direction, which `closed` ends.
    """

    def __init__(self, runtime: WorkerRuntime) -> None:
        self._engine = runtime.engine
        self._pool = runtime.pool
        self._held: dict[str, tuple[int, ...]] = {}

    def receive(self, leg: TransferLeg, start: int, end: int) -> None:
        """Let KV of tokens [start, end) land."""
        self._hold(leg, "in")
        slots = self._engine.storage.slots(leg.sequence.block_table, start, end)
        leg.peer.transfer.expect(leg.leg_id, start, slots)

    def open_sends(self, leg: TransferLeg) -> None:
        """Begin to send; what is sent follows piece by piece."""
        self._hold(leg, "out")
        leg.peer.transfer.open_sends(leg.leg_id)

    def send(
        self, leg: TransferLeg, chunk: int, groups: Iterable[LayerGroup], start: int, end: int
    ) -> None:
        """Send KV of tokens [start, end), if there are any, in some groups of layers."""
        if start >= end:
            return
        slots = self._engine.storage.slots(leg.sequence.block_table, start, end)
        for first_layer, num_layers, ready in groups:
            piece = Piece(leg.leg_id, chunk, first_layer, num_layers, start, slots, ready)
            leg.peer.transfer.send(piece)

    def send_computed(self, leg: TransferLeg, chunk: int, start: int, end: int) -> None:
        """Send KV of tokens [start, end) that was computed before, in every layer."""
        ready = self._engine.record_event()
        groups = [LayerGroup(first, count, ready) for first, count in self._engine.layer_groups]
        self.send(leg, chunk, groups, start, end)

    def closed(self, peer: TransferPeer, leg_id: int, direction: Direction) -> None:
        """Let go; a leg that never held anything is no error, as it may end before its grant."""
        holder = _holder(peer, leg_id, direction)
        blocks = self._held.pop(holder, None)
        if blocks is not None:
            self._pool.release_transfer(blocks, holder)

    def _hold(self, leg: TransferLeg, direction: Direction) -> None:
        """Keep every block of its sequence from being reused until `closed`."""
        holder = _holder(leg.peer, leg.leg_id, direction)
        blocks = tuple(leg.sequence.block_table)
        self._pool.hold_for_transfer(blocks, holder)
        self._held[holder] = blocks


def _holder(peer: TransferPeer, leg_id: int, direction: Direction) -> str:
    return f"transfer:{peer.name}:{leg_id}:{direction}"
