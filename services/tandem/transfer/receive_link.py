"""The receiving side of a link: answers its opening, receives pieces, scatters, acknowledges.

Every public method only changes the ledger or the inbox under the lock and wakes the thread. The
thread is the only one that writes blocks or waits for the wire. Everything announced is received:
into scratch, if its leg is not expected any more.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from tandem.core.errors import PeerMismatchError
from tandem.transfer import messages
from tandem.transfer.context import LinkContext, ended
from tandem.transfer.group import LinkError, LinkGroup
from tandem.transfer.receive_ledger import PieceRange, ReceiveLedger, RejectedPieceError
from tandem.transfer.spec import check_kv_spec
from tandem.transfer.staging import PieceBuffer
from tandem.v1 import worker_pb2


class ReceiveLink:
    """One direction of KV traffic, seen from the receiver (rank 1).

    ::

        closed --LinkOpen--> checking --match: LinkOpened--> connecting --> open --LinkAnnounce--+
          ^  ^                  |                              |            ^ |                  |
          |  +-- LinkOpened(error) <-- mismatch                |            | |   receive, scatter
          |                                                    |            | |   or drain, LinkAck
          |                                                    v            | v                  |
          +-- waits for the next epoch's LinkOpen <-- broken: LinkBroken, abort                  |
          |                                                                 +--------------------+
          +-- LinkClosed (evicted while idle)

    A LinkOpen of a later epoch or a LinkBroken aborts the current epoch in any state. `close`
    aborts and ends the thread.
    """

    def __init__(self, context: LinkContext) -> None:
        self._context = context
        self._buffer = PieceBuffer(context.blocks)
        self._ledger = ReceiveLedger(context.spec.num_layers)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        # All of the following are guarded by `_changed`.
        self._stopped = False
        self._epoch = 0
        self._broken = True
        self._inbox: deque[worker_pb2.LinkMessage] = deque()
        self._group: LinkGroup | None = None
        self._last_sequence_number = 0

    @property
    def is_open(self) -> bool:
        with self._changed:
            return self._group is not None

    # ------------------------------------------------------------ called by the worker

    def expect(self, leg_id: int, start: int, slots: torch.Tensor) -> None:
        written = None
        if self._context.blocks.kv.is_cuda:
            written = torch.cuda.current_stream(self._context.blocks.kv.device).record_event()
        self._update(lambda: self._ledger.expect(leg_id, start, slots, written))

    def close_leg(self, leg_id: int) -> None:
        self._update(lambda: self._ledger.close(leg_id))

    def close(self) -> None:
        """Stop for good: abort, close every leg, let the thread end."""
        with self._changed:
            self._stopped = True
            group = self._group
        self._update(self._ledger.shut)
        if group is not None:
            group.abort()

    def join(self, timeout: float) -> bool:
        """Wait for the thread after `close`. True if it has ended."""
        return ended(self._thread, timeout)

    def handle(self, message: worker_pb2.LinkMessage) -> None:
        """A message from the link's opener."""
        abort = None
        with self._changed:
            kind = message.WhichOneof("kind")
            opens = kind == "open"
            if self._stopped:
                return
            if message.epoch <= self._epoch if opens else message.epoch != self._epoch:
                self._context.counters.stale()
                return
            if opens or kind == "broken":
                self._inbox.clear()
                abort = self._group
            if opens:
                self._epoch = message.epoch
                self._broken = False
                self._start()
            if kind == "broken":
                self._broken = True
            elif not self._broken:
                self._inbox.append(message)
            self._changed.notify_all()
        if abort is not None:
            abort.abort()

    # ------------------------------------------------------------ shared state

    def _start(self) -> None:
        if self._thread is None:
            name = f"kv-receive-{self._context.peer_name}"
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()

    def _update(self, mutate: Callable[[], None]) -> None:
        """Change the ledger and report the legs that closed."""
        with self._changed:
            mutate()
            closed = self._ledger.take_closed()
            self._changed.notify_all()
        for leg_id in closed:
            self._context.events.receives_closed(leg_id)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        while (message := self._next_message()) is not None:
            try:
                self._take(message)
            except Exception as error:
                self._break(message.epoch, error)
        self._drop_group()

    def _next_message(self) -> worker_pb2.LinkMessage | None:
        with self._changed:
            while not self._stopped and not self._inbox:
                if self._broken and self._group is not None:
                    self._drop_group()
                self._changed.wait()
            return None if self._stopped else self._inbox.popleft()

    def _take(self, message: worker_pb2.LinkMessage) -> None:
        match message.WhichOneof("kind"):
            case "open":
                self._drop_group()
                self._open(message.epoch, message.open)
            case "announce":
                self._receive(message.epoch, message.announce)
            case "closed":
                self._drop_group()
                self._context.log.info("link closed", epoch=message.epoch, direction="receive")
            case kind:
                raise LinkError(f"a link's opener does not send {kind!r}")

    def _open(self, epoch: int, offer: worker_pb2.LinkOpen) -> None:
        """Check the peer, answer, and meet it in its store."""
        context = self._context
        try:
            check_kv_spec(context.spec, offer.kv_spec)
        except PeerMismatchError as error:
            self._refuse(epoch, str(error))
            return
        self._control(epoch, messages.opened())
        group = context.make_group(offer, 1, lambda: self._is_current(epoch))
        with self._changed:
            self._group = group
            if not self._is_current(epoch):
                raise LinkError("superseded while it was being opened")
            self._last_sequence_number = 0
        group.recv(self._buffer.probe(), context.config.connect_timeout)
        context.log.info("link opened", epoch=epoch, direction="receive")

    def _is_current(self, epoch: int) -> bool:
        return epoch == self._epoch and not self._broken and not self._stopped

    def _refuse(self, epoch: int, reason: str) -> None:
        with self._changed:
            failed = self._ledger.expected_legs
        self._context.log.error("peer refused", epoch=epoch, reason=reason)
        self._control(epoch, messages.opened(reason))
        self._context.events.link_failed(failed, reason)

    def _receive(self, epoch: int, announce: worker_pb2.LinkAnnounce) -> None:
        """Take one piece off the wire, put it where it belongs, acknowledge it."""
        with self._changed:
            group = self._group
            expected = self._last_sequence_number + 1
        if group is None:
            raise LinkError("a piece was announced on a link that is not open")
        if announce.sequence_number != expected:
            raise LinkError(f"piece {announce.sequence_number} announced, {expected} was next")
        wire = self._buffer.make_room(announce.num_layers, announce.num_tokens)
        started = time.monotonic()
        group.recv(wire, self._context.config.transfer_timeout)
        seconds = time.monotonic() - started
        landed = self._scatter(messages.piece_range(announce), seconds, wire.numel())
        self._context.counters.received(wire.numel(), seconds, landed=landed)
        with self._changed:
            self._last_sequence_number = expected
        self._control(epoch, messages.acknowledgement(expected))

    def _scatter(self, piece: PieceRange, seconds: float, nbytes: int) -> bool:
        """Write a received piece into its leg's blocks. False if it was not wanted, or failed."""
        landed = False
        try:
            with self._changed:
                target = self._ledger.begin(piece)
            if target is None:
                return False
            self._buffer.unpack(piece.first_layer, piece.num_layers, target.slots, target.written)
            landed = True
            self._context.trace.landed(self._context.peer_name, messages.ref_of_range(piece))
            self._context.events.piece_landed(*piece, seconds, nbytes)
        except Exception as error:
            reason = f"KV could not be scattered: {error}"
            if isinstance(error, RejectedPieceError):
                reason = str(error)
            self._context.log.error("piece failed", legs=[piece.leg_id], reason=reason)
            self._context.events.link_failed([piece.leg_id], reason)
        finally:
            self._update(lambda: self._ledger.end(landed=landed))
        return landed

    def _break(self, epoch: int, error: Exception) -> None:
        """This epoch is over. Tell the opener, which decides whether there will be another."""
        with self._changed:
            current = self._is_current(epoch)
            if current:
                self._broken = True
                self._inbox.clear()
        self._drop_group()
        if not current:
            return
        reason = str(error) or type(error).__name__
        self._context.log.warning("link broken", epoch=epoch, reason=reason, direction="receive")
        self._context.report_broken(messages.broken(reason), epoch, to_opener=True)

    def _drop_group(self) -> None:
        with self._changed:
            group, self._group = self._group, None
        if group is not None:
            group.abort()

    def _control(self, epoch: int, message: worker_pb2.LinkMessage) -> None:
        self._context.send(message, epoch, to_opener=True)
