"""The sending side of a link: opens it, packs pieces, sends them, waits for acknowledgements.

Every public method only changes the state that `send_state` guards, which wakes the thread. The
thread is the only one that reads blocks or waits for the peer. What was sent stays in the ledger
until it is acknowledged, so that a rebuilt link can send it again.
"""

from __future__ import annotations

import threading
import uuid

from tandem.core.errors import PeerMismatchError
from tandem.transfer import messages
from tandem.transfer.context import LinkContext, ended
from tandem.transfer.group import LinkGroup
from tandem.transfer.packer import Packer
from tandem.transfer.send_ledger import Outgoing
from tandem.transfer.send_state import LinkStoppedError, SendState
from tandem.transfer.types import Piece
from tandem.v1 import worker_pb2

_BACKOFF_SECONDS = 0.05
"""Pause before the first retry; doubles with each one in a row."""


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
        self._state = SendState(context, self._start)
        self._thread: threading.Thread | None = None
        self._store_prefix = uuid.uuid4().hex

    @property
    def is_open(self) -> bool:
        return self._state.group is not None

    # ------------------------------------------------------------ called by the worker

    def open(self, leg_id: int) -> None:
        self._state.update(lambda ledger: ledger.open(leg_id))

    def send(self, piece: Piece) -> None:
        self._state.update(lambda ledger: ledger.add(piece))

    def finish(self, leg_id: int) -> None:
        self._state.update(lambda ledger: ledger.finish(leg_id))

    def cancel(self, leg_id: int) -> None:
        self._state.update(lambda ledger: ledger.cancel(leg_id))

    def close(self) -> None:
        """Stop for good: abort, fail every leg, let the thread end."""
        self._state.stop(f"the connection to {self._context.peer_name} closed")

    def join(self, timeout: float) -> bool:
        """Wait for the thread after `close`. True if it has ended."""
        return ended(self._thread, timeout)

    def handle(self, message: worker_pb2.LinkMessage) -> None:
        """A message from the link's receiver."""
        self._state.heard(message)

    def _start(self) -> None:
        if self._thread is None:
            name = f"kv-send-{self._context.peer_name}"
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        while self._state.await_work():
            try:
                self._serve_epoch()
            except LinkStoppedError:
                return
            except PeerMismatchError as error:
                self._fail(str(error))
            except Exception as error:
                self._recover(error)

    def _serve_epoch(self) -> None:
        """Open the link and send until it is asked to give way."""
        context, state = self._context, self._state
        if not context.budget.acquire(state, lambda: not state.stopped):
            raise LinkStoppedError
        try:
            group = self._open()
            context.log.info("link opened", epoch=state.epoch, direction="send")
            self._send_pieces(group)
            self._control(messages.closed())
            context.log.info("link evicted", epoch=state.epoch)
        finally:
            opened = state.end_epoch()
            context.budget.release(state)
            if opened is not None:
                opened.abort()
            self._packer.discard()
            context.rendezvous.forget(self._prefix())

    def _open(self) -> LinkGroup:
        """A new epoch: hand-shake, group, and a first byte that proves it works."""
        context = self._context
        self._state.begin_epoch()
        offer = worker_pb2.LinkOpen(
            store_host=context.rendezvous.host,
            store_port=context.rendezvous.port(),
            store_prefix=self._prefix(),
            kv_spec=context.spec,
        )
        self._control(worker_pb2.LinkMessage(open=offer))
        self._state.await_answer()
        self._control(messages.connect())
        group = context.make_group(offer, 0)
        self._state.opened(group)
        group.post_send(self._packer.probe()).wait(context.config.connect_timeout)
        return group

    def _send_pieces(self, group: LinkGroup) -> None:
        """Send until asked to give way.

        Pieces are packed, announced and posted as long as there is staging for them, so that the
        peer posts its receives ahead, and the wire need not wait for control messages.
        """
        released = 0
        while (step := self._state.next_piece(self._packer.has_room, released)) is not None:
            acknowledged, outgoing = step
            if acknowledged > released:
                self._packer.acknowledged(acknowledged)
                released = acknowledged
            if outgoing is not None:
                self._send_from(outgoing, group)

    def _send_from(self, outgoing: Outgoing | None, group: LinkGroup) -> None:
        """Pack a piece and what is ready behind it, and announce and post it as one send.

        Small pieces that wait cost one send and one message together, and none waits for others.
        """
        batch = []
        while outgoing is not None:
            if self._pack(outgoing):
                batch.append(outgoing)
            outgoing = self._state.piece_behind(self._packer.may_join)
        if batch:
            self._control(messages.announcement(batch))
            self._packer.send(group)

    def _pack(self, outgoing: Outgoing) -> bool:
        """False: the piece could not be packed, and its leg fails."""
        try:
            self._packer.pack(outgoing)
        except Exception as error:
            self._abandon(error)
            return False
        self._state.update(lambda ledger: ledger.end_read())
        return True

    def _abandon(self, error: Exception) -> None:
        """A piece could not be packed: its leg fails, the link goes on."""
        reason = f"KV could not be packed: {error}"
        failed = self._state.abandon(reason)
        self._context.log.error("piece failed", legs=failed, reason=reason)
        self._context.events.link_failed(failed, reason)
        self._state.update(lambda ledger: None)

    def _recover(self, error: Exception) -> None:
        """The link broke. Tell the peer, then try again or give up."""
        broke = self._state.broke(error)
        if broke is None:
            return
        reason, retries = broke
        context, epoch = self._context, self._state.epoch
        context.log.warning("link broken", epoch=epoch, reason=reason, retries=retries)
        context.report_broken(messages.broken(reason), epoch)
        if retries > context.config.max_retries:
            self._fail(f"the link to {context.peer_name} broke {retries} times in a row: {reason}")
            return
        context.counters.retried()
        self._state.pause(_BACKOFF_SECONDS * 2 ** (retries - 1))

    def _fail(self, reason: str) -> None:
        """Give up on every leg; a later leg may try again."""
        failed = self._state.fail(reason)
        self._context.log.error("link failed", legs=failed, reason=reason)
        self._context.events.link_failed(failed, reason)
        self._state.update(lambda ledger: None)

    def _control(self, message: worker_pb2.LinkMessage) -> None:
        self._context.send(message, self._state.epoch)

    def _prefix(self) -> str:
        return f"{self._store_prefix}/{self._state.epoch}"
