"""All KV traffic with one peer: one link each way, behind one thread-safe, non-blocking door."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable

import torch

from tandem.core.config import TransferConfig
from tandem.tracing.buffer import TraceBuffer
from tandem.transfer.budget import LinkBudget
from tandem.transfer.context import LinkContext
from tandem.transfer.group import Rendezvous
from tandem.transfer.receive_link import ReceiveLink
from tandem.transfer.send_link import SendLink
from tandem.transfer.stats import TransferStats
from tandem.transfer.types import KVBlocks, Piece, TransferEvents
from tandem.v1 import worker_pb2

_EXIT_SECONDS = 2.0
_living: set[PeerTransfer] = set()
_living_lock = threading.Lock()


def _remember(transfer: PeerTransfer) -> None:
    with _living_lock:
        _living.difference_update([other for other in _living if other.ended])
        _living.add(transfer)


@atexit.register
def _close_all() -> None:
    """A thread that comes back from torch while the interpreter shuts down would crash it."""
    deadline = time.monotonic() + _EXIT_SECONDS
    with _living_lock:
        transfers = list(_living)
    for transfer in transfers:
        transfer.close()
    for transfer in transfers:
        transfer.join(max(0.0, deadline - time.monotonic()))


class PeerTransfer:
    """KV to and from one peer, for as long as its control stream lives.

    ::

        sending    open_sends -> send* -> finish_sends | cancel_sends  => sends_closed, once
        receiving  expect -> piece_landed* -> finish_receives | cancel_receives
                                                                       => receives_closed, once
        close      => everything aborted, every open leg closed, once

    Links open on first use. Calls return at once (an abort may take some milliseconds); what
    happens is reported through `TransferEvents`. `send_control` carries messages to the peer in
    order, must not block, and raises if the stream is gone. After `close`, a leg that is opened or
    expected closes at once.
    """

    def __init__(
        self,
        storage: KVBlocks,
        spec: worker_pb2.KVSpec,
        config: TransferConfig,
        send_control: Callable[[worker_pb2.LinkMessage], None],
        events: TransferEvents,
        peer_name: str,
        budget: LinkBudget,
        rendezvous: Rendezvous,
        trace: TraceBuffer | None = None,
    ) -> None:
        """`budget`, `rendezvous` and `trace` are shared by all peers of a worker."""
        context = LinkContext.make(
            storage, spec, config, send_control, events, peer_name, budget, rendezvous,
            trace or TraceBuffer(peer_name),
        )  # fmt: skip
        self.peer_name = peer_name
        self._context = context
        self._sends = SendLink(context)
        self._receives = ReceiveLink(context)
        self._closed = False
        _remember(self)

    def handle(self, message: worker_pb2.LinkMessage) -> None:
        """Take a message that the peer's stream brought."""
        if message.to_opener:
            self._sends.handle(message)
        else:
            self._receives.handle(message)

    def open_sends(self, leg_id: int) -> None:
        """Start sending a leg. Raises ValueError if it is open already."""
        self._sends.open(leg_id)

    def send(self, piece: Piece) -> None:
        """Queue a piece. Ignored if its leg has failed or was cancelled."""
        self._sends.send(piece)

    def finish_sends(self, leg_id: int) -> None:
        """No more pieces: the leg closes when all of them are acknowledged."""
        self._sends.finish(leg_id)

    def cancel_sends(self, leg_id: int) -> None:
        """Drop what is not on the wire yet: the leg closes when the rest is acknowledged."""
        self._sends.cancel(leg_id)

    def expect(self, leg_id: int, start: int, slots: torch.Tensor) -> None:
        """KV of positions [start, start + len(slots)) may be scattered into `slots` (int64).

        Call it before the peer may send. Raises ValueError if the leg is expected already.
        """
        self._receives.expect(leg_id, start, slots)

    def finish_receives(self, leg_id: int) -> None:
        """Everything has landed: the leg closes."""
        self._receives.close_leg(leg_id)

    def cancel_receives(self, leg_id: int) -> None:
        """Nothing more is wanted: the leg closes once no scatter runs; the rest is drained."""
        self._receives.close_leg(leg_id)

    def close(self) -> None:
        """The peer is gone: abort both links and close every leg."""
        self._closed = True
        self._sends.close()
        self._receives.close()

    def join(self, timeout: float) -> bool:
        """Wait for the threads after `close`; blocks. True if they have ended.

        They end at once, but for one that is just connecting: that one after `connect_timeout`.
        """
        deadline = time.monotonic() + timeout
        ended = self._sends.join(timeout)
        return self._receives.join(max(0.0, deadline - time.monotonic())) and ended

    @property
    def ended(self) -> bool:
        """Closed, and its threads have ended."""
        return self._closed and self.join(0.0)

    @property
    def num_open_links(self) -> int:
        """0 to 2."""
        return self._sends.is_open + self._receives.is_open

    def stats(self) -> TransferStats:
        """Counters since the start."""
        return self._context.counters.snapshot()
