"""All KV traffic of a worker with one peer, over every rank of both: rank 0's door to it.

To the worker it is one transfer: what it asks for is done by every rank on its own heads, and what
the ranks' links report is put together before the worker hears of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import structlog
import torch

from tandem.transfer.rank_links import RankLinks
from tandem.transfer.receive_ledger import PieceRange
from tandem.transfer.slice_ledger import SliceLedger
from tandem.transfer.slices import head_slices
from tandem.transfer.types import Piece, TransferEvents
from tandem.v1 import ranks_pb2, worker_pb2

log = structlog.get_logger(__name__)


class OtherRanks(Protocol):
    """The other ranks of this worker."""

    @property
    def iteration(self) -> int:
        """The last forward pass that they were told of."""

    def enter(self, transfer: RankedTransfer) -> int:
        """Number a peer; reports about it reach `transfer` from now on."""

    def leave(self, peer: int) -> None:
        """Nothing more is to be heard of a peer."""

    def tell(self, step: ranks_pb2.TransferStep) -> None:
        """Let every other rank do this, after all that they were told before."""

    def relay(self, peer: int, message: worker_pb2.LinkMessage) -> None:
        """Pass a peer's message on to the rank that it is for."""


class _NoOthers:
    """A worker of one rank."""

    iteration = 0

    def enter(self, transfer: RankedTransfer) -> int:
        return 0

    def leave(self, peer: int) -> None:
        """Nobody heard of it."""

    def tell(self, step: ranks_pb2.TransferStep) -> None:
        """Nobody is there."""

    def relay(self, peer: int, message: worker_pb2.LinkMessage) -> None:
        """It was for nobody."""


NO_OTHERS = _NoOthers()
_CLOSED = "the connection to the peer closed"

MakeLinks = Callable[[str, worker_pb2.KVSpec, TransferEvents], RankLinks]
"""Makes rank 0's own links, once the peer's spec is known."""
_Step = Callable[[RankLinks], None]
_Refusal = Callable[[], None]
"""What becomes of a step that comes after the end."""


class RankedTransfer:
    """As `PeerTransfer`, for a worker of any number of ranks.

    Until `meet` has been called with the peer's spec, what is asked for waits. After `close`, a
    leg that is opened or expected closes at once.
    """

    def __init__(
        self,
        ours: worker_pb2.KVSpec,
        make_links: MakeLinks,
        send_control: Callable[[worker_pb2.LinkMessage], None],
        events: TransferEvents,
        others: OtherRanks = NO_OTHERS,
    ) -> None:
        """`send_control` as in `PeerTransfer`; it carries the messages of every rank."""
        self._ours = ours
        self._make_links = make_links
        self._send_control = send_control
        self._events = events
        self._others = others
        self._peer = others.enter(self)
        # `_order` keeps the steps of every rank in one order; `_lock` guards the ledger and is
        # never held while anything else is called.
        self._order = threading.RLock()
        self._lock = threading.Lock()
        self._links: RankLinks | None = None
        self._ledger = SliceLedger(1, 1)
        self._waiting: list[tuple[_Step, _Refusal]] = []
        self._closed = False

    def meet(self, peer_name: str, theirs: worker_pb2.KVSpec) -> None:
        """The peer has said hello; its spec has been checked."""
        heads, ranks = self._ours.num_kv_heads, self._ours.tensor_parallel
        sends = head_slices(heads, ranks, theirs.tensor_parallel)
        receives = head_slices(heads, theirs.tensor_parallel, ranks)
        with self._order:
            if self._closed or self._links is not None:
                return
            self._ledger = SliceLedger(len(sends), len(receives))
            self._links = links = self._make_links(peer_name, theirs, _OwnEvents(self))
            met = ranks_pb2.PeerMet(name=peer_name, kv_spec=theirs, our_spec=self._ours)
            self._tell(met=met)
            for step, _ in self._waiting:
                step(links)
            self._waiting.clear()

    def handle(self, message: worker_pb2.LinkMessage) -> None:
        """Take a message that the peer's stream brought, for whichever rank."""
        if message.to_rank:
            self._others.relay(self._peer, message)
        elif self._links is not None:
            self._links.handle(message)

    def open_sends(self, leg_id: int) -> None:
        """Start sending a leg. Raises ValueError if it is open already."""

        def step(links: RankLinks) -> None:
            with self._lock:
                self._ledger.open_sends(leg_id)
            self._tell(open_sends=leg_id)
            links.open_sends(leg_id)

        self._in_order(step, lambda: self._events.sends_closed(leg_id, _CLOSED))

    def send(self, piece: Piece) -> None:
        """Queue a piece. The other ranks send theirs once their forward pass has come as far."""

        def step(links: RankLinks) -> None:
            self._tell(send=_send_piece(piece, self._others.iteration))
            links.send(piece)

        self._in_order(step)

    def finish_sends(self, leg_id: int) -> None:
        """No more pieces: the leg closes when all of them are acknowledged."""

        def step(links: RankLinks) -> None:
            self._tell(finish_sends=leg_id)
            links.finish_sends(leg_id)

        self._in_order(step)

    def cancel_sends(self, leg_id: int) -> None:
        """Drop what is not on the wire yet: the leg closes when the rest is acknowledged."""

        def step(links: RankLinks) -> None:
            self._tell(cancel_sends=leg_id)
            links.cancel_sends(leg_id)

        self._in_order(step)

    def expect(self, leg_id: int, start: int, slots: torch.Tensor) -> None:
        """KV of positions [start, start + len(slots)) may be scattered into `slots` (int64).

        Call it before the peer may send. Raises ValueError if the leg is expected already.
        """

        def step(links: RankLinks) -> None:
            with self._lock:
                self._ledger.expect(leg_id)
            wanted = ranks_pb2.ExpectLeg(leg_id=leg_id, start=start, slots=_bytes(slots))
            self._tell(expect=wanted)
            links.expect(leg_id, start, slots)

        self._in_order(step, lambda: self._events.receives_closed(leg_id))

    def finish_receives(self, leg_id: int) -> None:
        """Everything has landed, or nothing more is wanted: the leg closes."""

        def step(links: RankLinks) -> None:
            self._tell(close_receives=leg_id)
            links.close_receives(leg_id)

        self._in_order(step)

    cancel_receives = finish_receives

    def close(self) -> None:
        """The peer is gone: abort every link and close every leg."""
        with self._order:
            if self._closed:
                return
            self._closed = True
            for _, refuse in self._waiting:
                refuse()
            self._waiting.clear()
            if self._links is not None:
                self._tell(close=True)
                self._links.close()
        self._leave_if_done()

    def send_control(self, message: worker_pb2.LinkMessage) -> None:
        """Pass on what a link of another rank has to say to the peer, if that can still hear it."""
        try:
            self._send_control(message)
        except Exception as error:
            log.warning("peer unreachable", reason=str(error))

    # -- what the links of one rank report; from transfer threads, and for other ranks from `others`

    def slice_landed(self, piece: PieceRange, seconds: float, nbytes: int) -> None:
        """One slice of a piece stands in its blocks."""
        with self._lock:
            landed = self._ledger.landed(piece, seconds, nbytes)
        if landed is not None:
            self._events.piece_landed(*piece, landed.seconds, landed.nbytes)

    def link_sends_closed(self, leg_id: int, error: str | None) -> None:
        """One link reads no block of the leg any more."""
        with self._lock:
            last, first_error = self._ledger.sends_closed(leg_id, error)
        if last:
            self._events.sends_closed(leg_id, first_error)
            self._leave_if_done()

    def link_receives_closed(self, leg_id: int) -> None:
        """One link writes no block of the leg any more."""
        with self._lock:
            last = self._ledger.receives_closed(leg_id)
        if last:
            self._events.receives_closed(leg_id)
            self._leave_if_done()

    def link_failed(self, leg_ids: Sequence[int], reason: str) -> None:
        """These legs cannot go on over one link; the worker ends them on all."""
        self._events.link_failed(leg_ids, reason)

    # -- inside

    def _in_order(self, step: _Step, refuse: _Refusal = lambda: None) -> None:
        with self._order:
            if self._closed:
                refuse()
            elif self._links is None:
                self._waiting.append((step, refuse))
            else:
                step(self._links)

    def _tell(self, **step: Any) -> None:
        if self._others is not NO_OTHERS:
            self._others.tell(ranks_pb2.TransferStep(peer=self._peer, **step))

    def _leave_if_done(self) -> None:
        with self._lock:
            done = self._closed and self._ledger.idle
        if done:
            self._others.leave(self._peer)


class _OwnEvents:
    """The `TransferEvents` of rank 0's own links."""

    def __init__(self, transfer: RankedTransfer) -> None:
        self._transfer = transfer

    def piece_landed(
        self, leg_id: int, first_layer: int, num_layers: int, start: int, num_tokens: int,
        seconds: float, nbytes: int,
    ) -> None:  # fmt: skip
        piece = PieceRange(leg_id, first_layer, num_layers, start, num_tokens)
        self._transfer.slice_landed(piece, seconds, nbytes)

    def sends_closed(self, leg_id: int, error: str | None) -> None:
        self._transfer.link_sends_closed(leg_id, error)

    def receives_closed(self, leg_id: int) -> None:
        self._transfer.link_receives_closed(leg_id)

    def link_failed(self, leg_ids: Sequence[int], reason: str) -> None:
        self._transfer.link_failed(leg_ids, reason)


def _send_piece(piece: Piece, iteration: int) -> ranks_pb2.SendPiece:
    return ranks_pb2.SendPiece(
        leg_id=piece.leg_id,
        chunk=piece.chunk,
        first_layer=piece.first_layer,
        num_layers=piece.num_layers,
        start=piece.start,
        slots=_bytes(piece.slots),
        iteration=iteration,
    )


def _bytes(slots: torch.Tensor) -> bytes:
    return slots.cpu().numpy().tobytes()
