"""The receiving side of a link: answers its opening, receives pieces, scatters, acknowledges.

Every public method only changes the ledger or the inbox under the lock and wakes the thread. The
thread is the only one that writes blocks or waits for the wire. Everything announced is received:
into scratch, if its leg is not expected any more.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import partial

import torch

from tandem.core.errors import PeerMismatchError
from tandem.transfer import messages
from tandem.transfer.arrivals import Arrivals
from tandem.transfer.context import LinkContext, ended
from tandem.transfer.group import LinkError, LinkGroup
from tandem.transfer.receive_ledger import PieceRange, ReceiveLedger, RejectedPieceError
from tandem.transfer.spec import check_kv_spec
from tandem.v1 import worker_pb2


class ReceiveLink:
    """One direction of KV traffic, seen from the receiver (rank 1).

    ::

        closed --LinkOpen--> checking --match: LinkOpened--> answered --LinkConnect--> open
          ^  ^                  |                               |                      | ^
          |  +-- LinkOpened(error) <-- mismatch                 |     LinkAnnounce: post a receive
          |                                                     |     it arrives: scatter or drain,
          |                                                     v                LinkAck | |
          +-- waits for the next epoch's LinkOpen <-- broken: LinkBroken, abort <--------+ |
          +-- LinkClosed (evicted while idle) <--------------------------------------------+

    A LinkOpen of a later epoch or a LinkBroken aborts the current epoch in any state. `close`
    aborts and ends the thread.
    """

    def __init__(self, context: LinkContext) -> None:
        self._context = context
        self._arrivals = Arrivals(context)
        self._ledger = ReceiveLedger(context.spec.num_layers)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        # All of the following are guarded by `_changed`.
        self._stopped = False
        self._epoch = 0
        self._broken = True
        self._inbox: deque[worker_pb2.LinkMessage] = deque()
        self._group: LinkGroup | None = None
        # The thread's own:
        self._open_epoch = 0

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
        while (step := self._next_step()) is not None:
            epoch, act = step
            try:
                act()
            except Exception as error:
                self._break(epoch, error)
        self._drop_group()

    def _next_step(self) -> tuple[int, Callable[[], None]] | None:
        """Wait for something to do; returns it and its epoch. None: the link was stopped.

        What was announced is posted before what has arrived is scattered, so the wire never waits
        for blocks.
        """
        with self._changed:
            while not self._stopped:
                if self._broken and self._group is not None:
                    self._drop_group()
                if (message := self._first_message()) is not None:
                    self._inbox.popleft()
                    return message.epoch, partial(self._take, message)
                if self._arrivals:
                    return self._open_epoch, self._land
                self._changed.wait()
            return None

    def _first_message(self) -> worker_pb2.LinkMessage | None:
        """The next message if its turn has come: in order, but for an epoch that replaces this."""
        if not self._inbox:
            return None
        message = self._inbox[0]
        turn = not self._arrivals or message.HasField("open")
        if message.HasField("announce"):
            turn = self._arrivals.has_room(message.announce)
        return message if turn else None

    def _take(self, message: worker_pb2.LinkMessage) -> None:
        match message.WhichOneof("kind"):
            case "open":
                self._drop_group()
                self._open(message.epoch, message.open)
            case "announce":
                self._post(message.announce)
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
        self._await_connect(epoch)
        group = context.make_group(offer, 1)
        with self._changed:
            self._group = group
            self._open_epoch = epoch
            self._check_current(epoch)
        group.post_recv(self._arrivals.probe()).wait(context.config.connect_timeout)
        context.log.info("link opened", epoch=epoch, direction="receive")

    def _await_connect(self, epoch: int) -> None:
        """Wait until the opener is about to make the group, which cannot be interrupted."""
        timeout = self._context.config.connect_timeout
        with self._changed:
            called = self._changed.wait_for(
                lambda: self._inbox or not self._is_current(epoch), timeout
            )
            self._check_current(epoch)
            if not called:
                raise LinkError(f"the peer did not come to open the link within {timeout:g} s")
            if not self._inbox.popleft().HasField("connect"):
                raise LinkError("the peer sent something else than its LinkConnect")

    def _is_current(self, epoch: int) -> bool:
        return epoch == self._epoch and not self._broken and not self._stopped

    def _check_current(self, epoch: int) -> None:
        if not self._is_current(epoch):
            raise LinkError("aborted while it was being opened")

    def _refuse(self, epoch: int, reason: str) -> None:
        with self._changed:
            failed = self._ledger.expected_legs
        self._context.log.error("peer refused", epoch=epoch, reason=reason)
        self._control(epoch, messages.opened(reason))
        self._context.events.link_failed(failed, reason)

    def _post(self, announce: worker_pb2.LinkAnnounce) -> None:
        """Receive an announced piece behind those that are on their way."""
        with self._changed:
            group = self._group
        if group is None:
            raise LinkError("a piece was announced on a link that is not open")
        self._arrivals.post(announce, group)

    def _post_announced(self) -> None:
        """Post what was announced meanwhile, as far as there is staging for it."""
        while True:
            with self._changed:
                message = self._first_message()
                if message is None or not message.HasField("announce"):
                    return
                self._inbox.popleft()
            self._post(message.announce)

    def _land(self) -> None:
        """Wait for the oldest send, put its pieces where they belong, acknowledge them."""
        arrival, seconds = self._arrivals.wait()
        self._post_announced()
        share = seconds / len(arrival.announced)
        for piece, staged in self._arrivals.pieces(arrival):
            landed = self._scatter(piece, staged, share)
            self._context.counters.received(staged.nbytes, share, landed=landed)
        self._arrivals.release()
        self._control(self._open_epoch, messages.acknowledgement(arrival.last_number))

    def _scatter(self, piece: PieceRange, staged: torch.Tensor, seconds: float) -> bool:
        """Write a received piece into its leg's blocks. False if it was not wanted, or failed."""
        landed = False
        context = self._context
        try:
            with self._changed:
                target = self._ledger.begin(piece)
            if target is None:
                return False
            self._arrivals.scatter(piece, staged, target)
            landed = True
            context.trace.landed(context.peer_name, messages.ref_of_range(piece))
            context.events.piece_landed(*piece, seconds, staged.nbytes)
        except Exception as error:
            reason = f"KV could not be scattered: {error}"
            if isinstance(error, RejectedPieceError):
                reason = str(error)
            context.log.error("piece failed", legs=[piece.leg_id], reason=reason)
            context.events.link_failed([piece.leg_id], reason)
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
        self._arrivals.discard()

    def _control(self, epoch: int, message: worker_pb2.LinkMessage) -> None:
        self._context.send(message, epoch, to_opener=True)
