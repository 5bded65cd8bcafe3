"""What the two links to one peer share, and the guard around the worker's callbacks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from tandem.core.config import TransferConfig
from tandem.tracing.buffer import TraceBuffer
from tandem.transfer.budget import LinkBudget
from tandem.transfer.group import LinkGroup, Rendezvous, connect_store, open_group
from tandem.transfer.spec import Backend
from tandem.transfer.stats import TransferCounters
from tandem.transfer.types import KVBlocks, TransferEvents
from tandem.v1 import worker_pb2


class GuardedEvents:
    """A worker's `TransferEvents` whose exceptions are logged and never reach a transfer thread."""

    def __init__(self, events: TransferEvents, log: Any) -> None:
        self._events = events
        self._log = log

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
        self._call(
            self._events.piece_landed,
            leg_id,
            first_layer,
            num_layers,
            start,
            num_tokens,
            seconds,
            nbytes,
        )

    def sends_closed(self, leg_id: int, error: str | None) -> None:
        self._call(self._events.sends_closed, leg_id, error)

    def receives_closed(self, leg_id: int) -> None:
        self._call(self._events.receives_closed, leg_id)

    def link_failed(self, leg_ids: Sequence[int], reason: str) -> None:
        if leg_ids:
            self._call(self._events.link_failed, leg_ids, reason)

    def _call(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            callback(*arguments)
        except Exception:
            self._log.exception("transfer callback failed", callback=callback.__name__)


@dataclass(frozen=True, slots=True)
class LinkContext:
    """Everything that a link needs from outside."""

    blocks: KVBlocks
    spec: worker_pb2.KVSpec
    backend: Backend
    config: TransferConfig
    send_control: Callable[[worker_pb2.LinkMessage], None]
    events: TransferEvents
    budget: LinkBudget
    rendezvous: Rendezvous
    counters: TransferCounters
    peer_name: str
    trace: TraceBuffer
    log: Any = None

    def make_group(self, offer: worker_pb2.LinkOpen, rank: int) -> LinkGroup:
        """Make the epoch's group in the opener's store, where the peer is about to come too.

        Blocks for `connect_timeout` at most, and cannot be interrupted. Raises `LinkError`.
        """
        timeout = self.config.connect_timeout
        store = connect_store(offer.store_host, offer.store_port, offer.store_prefix, timeout)
        host, device = self.rendezvous.host, self.blocks.kv.device
        return open_group(self.backend, store, rank, host, device, timeout)

    def send(self, message: worker_pb2.LinkMessage, epoch: int, *, to_opener: bool = False) -> None:
        """Stamp a control message and send it. Raises if the peer's stream is gone."""
        message.epoch = epoch
        message.to_opener = to_opener
        self.send_control(message)

    def report_broken(
        self, message: worker_pb2.LinkMessage, epoch: int, *, to_opener: bool = False
    ) -> None:
        """Send a LinkBroken if the peer can still hear it."""
        try:
            self.send(message, epoch, to_opener=to_opener)
        except Exception as error:
            self.log.warning("peer unreachable", reason=str(error))

    @classmethod
    def make(
        cls,
        blocks: KVBlocks,
        spec: worker_pb2.KVSpec,
        config: TransferConfig,
        send_control: Callable[[worker_pb2.LinkMessage], None],
        events: TransferEvents,
        peer_name: str,
        budget: LinkBudget,
        rendezvous: Rendezvous,
        trace: TraceBuffer,
    ) -> LinkContext:
        """Bind logs and guard the callbacks."""
        log = structlog.get_logger().bind(peer=peer_name)
        return cls(
            blocks=blocks,
            spec=spec,
            backend="nccl" if spec.backend == "nccl" else "gloo",
            config=config,
            send_control=send_control,
            events=GuardedEvents(events, log),
            budget=budget,
            rendezvous=rendezvous,
            counters=TransferCounters(),
            peer_name=peer_name,
            trace=trace,
            log=log,
        )


def ended(thread: threading.Thread | None, timeout: float) -> bool:
    """Wait for a link's thread, if it ever had one. True if it has ended."""
    if thread is None:
        return True
    thread.join(timeout)
    return not thread.is_alive()
