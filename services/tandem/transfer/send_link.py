"""The sending side of a link: opens it, packs pieces, sends them, waits for acknowledgements.

Every public method only changes the ledger under the lock and wakes the thread. The thread is the
only one that reads blocks or waits for the peer. What was sent stays in the ledger until it is
acknowledged, so that a rebuilt link can send it again.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable

from tandem.core.errors import PeerMismatchError
from tandem.transfer import messages
from tandem.transfer.context import LinkContext, ended
from tandem.transfer.group import LinkError, LinkGroup
from tandem.transfer.packer import Packed, Packer
from tandem.transfer.send_ledger import Outgoing, SendLedger
from tandem.transfer.types import Piece
from tandem.v1 import worker_pb2

_BACKOFF_SECONDS = 0.05
"""Pause before the first retry; doubles with each one in a row."""


class _LinkStoppedError(Exception):
    """The link was closed while its thread was at work."""


class SendLink:
    """One direction of KV traffic, seen from the sender (rank 0).

    ::

        closed --a piece is queued--> waiting for the budget --granted--> opening
        opening --LinkOpened, group made--> open
        opening --LinkOpened(error): mismatch--> failed
        opening, open --any error--> broken (LinkBroken sent, group aborted)
        open --idle, or its turn is over, and asked to give way--> closed (LinkClosed sent)
        broken --back-off, next epoch, what is unacknowledged again--> waiting for the budget
        broken --more than max_retries in a row--> failed
        failed: every leg closes with the error --> closed
        any state --close--> stopped (group aborted, every leg closes with an error, thread ends)
    """

    def __init__(self, context: LinkContext) -> None:
        self._context = context
        self._packer = Packer(context)
        self._ledger = SendLedger()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._store_prefix = uuid.uuid4().hex
        # All of the following are guarded by `_changed`.
        self._stopped = False
        self._epoch = 0
        self._group: LinkGroup | None = None
        self._answer: str | None = None
        self._broken: str | None = None
        self._give_way = False
        self._retries = 0
        self._progress_at = 0.0

    @property
    def is_open(self) -> bool:
        with self._changed:
            return self._group is not None

    # ------------------------------------------------------------ called by the worker

    def open(self, leg_id: int) -> None:
        self._update(lambda: self._ledger.open(leg_id))

    def send(self, piece: Piece) -> None:
        self._update(lambda: self._ledger.add(piece))

    def finish(self, leg_id: int) -> None:
        self._update(lambda: self._ledger.finish(leg_id))

    def cancel(self, leg_id: int) -> None:
        self._update(lambda: self._ledger.cancel(leg_id))

    def close(self) -> None:
        """Stop for good: abort, fail every leg, let the thread end."""
        with self._changed:
            self._stopped = True
            group = self._group
        reason = f"the connection to {self._context.peer_name} closed"
        self._update(lambda: self._ledger.shut(reason))
        self._context.budget.wake()
        if group is not None:
            group.abort()

    def join(self, timeout: float) -> bool:
        """Wait for the thread after `close`. True if it has ended."""
        return ended(self._thread, timeout)

    def handle(self, message: worker_pb2.LinkMessage) -> None:
        """A message from the link's receiver."""
        with self._changed:
            if message.epoch != self._epoch:
                self._context.counters.stale()
                return
            kind = message.WhichOneof("kind")
            if kind == "opened":
                self._answer = message.opened.error
            elif kind == "broken":
                self._broken = f"reported by {self._context.peer_name}: {message.broken.reason}"
            elif kind == "ack" and self._group is not None:
                self._acknowledged(message.ack.sequence_number)
            group = self._group if self._broken else None
        self._update(lambda: None)
        if group is not None:
            group.abort()

    def give_way(self) -> None:
        """The budget asks for this link's place."""
        with self._changed:
            self._give_way = True
            self._changed.notify_all()

    # ------------------------------------------------------------ shared state

    def _acknowledged(self, sequence_number: int) -> None:
        if not self._ledger.ack(sequence_number):
            self._broken = f"piece {sequence_number} was acknowledged but never sent"
        self._retries = 0
        self._progress_at = time.monotonic()

    def _update(self, mutate: Callable[[], object]) -> None:
        """Change the ledger, wake the thread, and report the legs that closed."""
        with self._changed:
            mutate()
            closed = self._ledger.take_closed()
            if self._ledger.has_queued and self._thread is None:
                name = f"kv-send-{self._context.peer_name}"
                self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._thread.start()
            self._changed.notify_all()
        for leg_id, error in closed:
            self._context.events.sends_closed(leg_id, error)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        while self._await_work():
            try:
                self._serve_epoch()
            except _LinkStoppedError:
                return
            except PeerMismatchError as error:
                self._fail(str(error))
            except Exception as error:
                self._recover(error)

    def _await_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self._ledger.idle)
            return not self._stopped

    def _serve_epoch(self) -> None:
        """Open the link and send until it is asked to give way."""
        context = self._context
        if not context.budget.acquire(self, lambda: not self._stopped):
            raise _LinkStoppedError
        try:
            group = self._open()
            context.log.info("link opened", epoch=self._epoch, direction="send")
            self._send_pieces(group)
            self._control(messages.closed())
            context.log.info("link evicted", epoch=self._epoch)
        finally:
            with self._changed:
                opened, self._group = self._group, None
                self._give_way = False
            context.budget.release(self)
            if opened is not None:
                opened.abort()
            context.rendezvous.forget(self._prefix())

    def _open(self) -> LinkGroup:
        """A new epoch: hand-shake, group, and a first byte that proves it works."""
        context = self._context
        with self._changed:
            self._epoch += 1
            self._answer = self._broken = None
        self._update(self._ledger.rewind)
        offer = worker_pb2.LinkOpen(
            store_host=context.rendezvous.host,
            store_port=context.rendezvous.port(),
            store_prefix=self._prefix(),
            kv_spec=context.spec,
        )
        self._control(worker_pb2.LinkMessage(open=offer))
        self._await_answer()
        group = context.make_group(offer, 0, lambda: not (self._stopped or self._broken))
        with self._changed:
            self._group = group
            self._check_alive()
            self._progress_at = time.monotonic()
        group.send(self._packer.probe(), context.config.connect_timeout)
        return group

    def _await_answer(self) -> None:
        with self._changed:
            answered = self._changed.wait_for(
                lambda: self._stopped or self._broken or self._answer is not None,
                self._context.config.connect_timeout,
            )
            self._check_alive()
            if not answered:
                raise LinkError("the peer did not answer the link's opening")
            if self._answer:
                raise PeerMismatchError(self._answer)

    def _next_piece(self) -> Outgoing | None:
        """Wait for a piece to send, watching acknowledgements. None: the link gives way."""
        patience = self._context.config.transfer_timeout
        with self._changed:
            while True:
                self._check_alive()
                if self._give_way and not self._ledger.has_in_flight:
                    return None
                if self._ledger.has_queued and not self._give_way:
                    self._context.budget.set_idle(self, False)
                    if not self._ledger.has_in_flight:
                        self._progress_at = time.monotonic()
                    return self._ledger.begin()
                if not self._ledger.has_in_flight:
                    self._context.budget.set_idle(self, True)
                    self._changed.wait()
                    continue
                left = self._progress_at + patience - time.monotonic()
                if left <= 0:
                    raise LinkError(f"no piece was acknowledged for {patience:g} s")
                self._changed.wait(left)

    def _send_pieces(self, group: LinkGroup) -> None:
        """Send until asked to give way.

        The piece after the one on the wire is packed and announced ahead, if it is there: its
        announcement travels meanwhile, so that the peer waits for the first of a row only.
        """
        ahead: Packed | None = None
        while True:
            if (packed := ahead) is None:
                outgoing = self._next_piece()
                if outgoing is None:
                    return
                packed = self._pack(outgoing)
            following = self._piece_ahead()
            ahead = self._pack(following) if following is not None else None
            if packed is not None:
                self._packer.send(packed, group)

    def _piece_ahead(self) -> Outgoing | None:
        """The next piece if it can be packed without waiting for anything."""
        with self._changed:
            self._check_alive()
            if self._give_way or not self._ledger.has_queued:
                return None
            ready = self._ledger.first_queued.ready
            if ready is not None and not ready.query():  # type: ignore[no-untyped-call]
                return None
            return self._ledger.begin()

    def _pack(self, outgoing: Outgoing) -> Packed | None:
        """Pack and announce a piece. None: it could not be packed, and its leg fails."""
        try:
            packed = self._packer.pack(outgoing.piece)
        except Exception as error:
            self._abandon(error)
            return None
        self._update(self._ledger.end_read)
        self._control(messages.announcement(outgoing))
        return packed

    def _abandon(self, error: Exception) -> None:
        """A piece could not be packed: its leg fails, the link goes on."""
        reason = f"KV could not be packed: {error}"
        with self._changed:
            failed = self._ledger.abandon(reason)
        self._context.log.error("piece failed", legs=failed, reason=reason)
        self._context.events.link_failed(failed, reason)
        self._update(lambda: None)

    def _recover(self, error: Exception) -> None:
        """The link broke. Tell the peer, then try again or give up."""
        with self._changed:
            if self._stopped:
                return
            reason = self._broken or str(error) or type(error).__name__
            self._retries += 1
            retries = self._retries
        context = self._context
        context.log.warning("link broken", epoch=self._epoch, reason=reason, retries=retries)
        context.report_broken(messages.broken(reason), self._epoch)
        if retries > context.config.max_retries:
            self._fail(f"the link to {context.peer_name} broke {retries} times in a row: {reason}")
            return
        context.counters.retried()
        with self._changed:
            pause = _BACKOFF_SECONDS * 2 ** (retries - 1)
            self._changed.wait_for(lambda: self._stopped, pause)

    def _fail(self, reason: str) -> None:
        """Give up on every leg; a later leg may try again."""
        with self._changed:
            self._retries = 0
            failed = self._ledger.fail(reason)
        self._context.log.error("link failed", legs=failed, reason=reason)
        self._context.events.link_failed(failed, reason)
        self._update(lambda: None)

    def _check_alive(self) -> None:
        if self._stopped:
            raise _LinkStoppedError
        if self._broken:
            raise LinkError(self._broken)

    def _control(self, message: worker_pb2.LinkMessage) -> None:
        self._context.send(message, self._epoch)

    def _prefix(self) -> str:
        return f"{self._store_prefix}/{self._epoch}"
