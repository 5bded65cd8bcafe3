"""What a sending link's thread and everyone else share, behind one lock.

Whoever changes something wakes the thread; legs that closed are reported without the lock held. No
wire and no blocks here: those are the thread's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from tandem.core.errors import PeerMismatchError
from tandem.transfer.context import LinkContext
from tandem.transfer.group import LinkError, LinkGroup
from tandem.transfer.send_ledger import Outgoing, SendLedger
from tandem.transfer.types import Piece
from tandem.v1 import worker_pb2


class LinkStoppedError(Exception):
    """The link was closed while its thread was at work."""


class SendState:
    """The ledger, the epoch, and what the peer has said. Every method may be called by anyone.

    It is what the budget knows of the link. Methods that wait are the thread's; they raise
    `LinkStoppedError` after `stop` and `LinkError` once the epoch is broken.
    """

    def __init__(self, context: LinkContext, wake: Callable[[], None]) -> None:
        """`wake`: starts the thread if it does not run yet; called under the lock."""
        self._context = context
        self._wake = wake
        self._ledger = SendLedger()
        self._changed = threading.Condition()
        self._stopped = False
        self._epoch = 0
        self._group: LinkGroup | None = None
        self._answer: str | None = None
        self._broken: str | None = None
        self._give_way = False
        self._retries = 0
        self._progress_at = 0.0
        self._acknowledged = 0

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def group(self) -> LinkGroup | None:
        with self._changed:
            return self._group

    @property
    def stopped(self) -> bool:
        return self._stopped

    def update(self, mutate: Callable[[SendLedger], object]) -> None:
        """Change the ledger, wake the thread, and report the legs that closed."""
        with self._changed:
            mutate(self._ledger)
            closed = self._ledger.take_closed()
            if self._ledger.has_queued:
                self._wake()
            self._changed.notify_all()
        for leg_id, error in closed:
            self._context.events.sends_closed(leg_id, error)

    def stop(self, reason: str) -> None:
        """No more epochs: fail every leg, and abort the group."""
        with self._changed:
            self._stopped = True
            group = self._group
        self.update(lambda ledger: ledger.shut(reason))
        self._context.budget.wake()
        if group is not None:
            group.abort()

    def heard(self, message: worker_pb2.LinkMessage) -> None:
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
                self._take_ack(message.ack.sequence_number)
            group = self._group if self._broken else None
        self.update(lambda ledger: None)
        if group is not None:
            group.abort()

    def give_way(self) -> None:
        """The budget wants this link's place."""
        with self._changed:
            self._give_way = True
            self._changed.notify_all()

    # ------------------------------------------------------------ the thread's

    def await_work(self) -> bool:
        """Wait for something to send. False: the link was stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self._ledger.idle)
            return not self._stopped

    def begin_epoch(self) -> None:
        """What was not acknowledged is queued again."""
        with self._changed:
            self._epoch += 1
            self._answer = self._broken = None
            self._acknowledged = 0
        self.update(lambda ledger: ledger.rewind())

    def await_answer(self) -> None:
        """Wait until the peer has let us in. Raises `PeerMismatchError` if it refuses."""
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

    def opened(self, group: LinkGroup) -> None:
        """The epoch has its group, which `stop` and a broken link abort from now on."""
        with self._changed:
            self._group = group
            self._check_alive()
            self._progress_at = time.monotonic()

    def end_epoch(self) -> LinkGroup | None:
        """Returns the group, which is the caller's to abort."""
        with self._changed:
            group, self._group = self._group, None
            self._give_way = False
        return group

    def next_piece(
        self, has_room: Callable[[Piece], bool], released: int
    ) -> tuple[int, Outgoing | None] | None:
        """Wait for a piece that may go, or for more than `released` acknowledgements.

        Returns the last acknowledged number, and the piece, if it is one's turn; None: the link
        gives way. A piece whose staging is still taken waits for acknowledgements.
        """
        patience = self._context.config.transfer_timeout
        with self._changed:
            while True:
                self._check_alive()
                busy = self._ledger.has_in_flight
                if self._give_way and not busy:
                    return None
                if self._acknowledged > released:
                    return self._acknowledged, None
                if self._ledger.has_queued and not self._give_way:
                    self._context.budget.set_idle(self, False)
                    if not busy:
                        self._progress_at = time.monotonic()
                    if has_room(self._ledger.first_queued):
                        return self._acknowledged, self._ledger.begin()
                if not busy:
                    self._context.budget.set_idle(self, True)
                    self._changed.wait()
                    continue
                left = self._progress_at + patience - time.monotonic()
                if left <= 0:
                    raise LinkError(f"no piece was acknowledged for {patience:g} s")
                self._changed.wait(left)

    def piece_behind(self, may_join: Callable[[Piece], bool]) -> Outgoing | None:
        """The next piece, if there is one that may travel with the one before."""
        with self._changed:
            if self._give_way or not self._ledger.has_queued:
                return None
            return self._ledger.begin() if may_join(self._ledger.first_queued) else None

    def abandon(self, reason: str) -> list[int]:
        """The piece of the last `next_piece` could not be packed. Returns the legs that fail."""
        with self._changed:
            return self._ledger.abandon(reason)

    def broke(self, error: Exception) -> tuple[str, int] | None:
        """Count a broken epoch. Returns why and how many in a row; None: the link was stopped."""
        with self._changed:
            if self._stopped:
                return None
            self._retries += 1
            return self._broken or str(error) or type(error).__name__, self._retries

    def pause(self, seconds: float) -> None:
        """Back off, unless the link is stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped, seconds)

    def fail(self, reason: str) -> list[int]:
        """Give up on every leg, and count retries anew. Returns the legs that fail."""
        with self._changed:
            self._retries = 0
            return self._ledger.fail(reason)

    # ------------------------------------------------------------ inside

    def _take_ack(self, sequence_number: int) -> None:
        if not self._ledger.ack(sequence_number):
            self._broken = f"piece {sequence_number} was acknowledged but never sent"
            return
        self._acknowledged = max(self._acknowledged, sequence_number)
        self._retries = 0
        self._progress_at = time.monotonic()

    def _check_alive(self) -> None:
        if self._stopped:
            raise LinkStoppedError
        if self._broken:
            raise LinkError(self._broken)
