"""The KV links of a rank other than 0: every peer's, as rank 0 says, and what they report to it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tandem.core.config import TandemConfig
from tandem.kvcache.storage import KVStorage
from tandem.transfer import LinkBudget, Piece, RankLinks, Rendezvous
from tandem.v1 import ranks_pb2, worker_pb2
from tandem.worker.channel import Channel
from tandem.worker.written import Point, Ready, WrittenLayers


class _Reporter:
    """The `TransferEvents` of one peer: everything goes to rank 0. Any thread."""

    def __init__(self, peer: int, channel: Channel) -> None:
        self._peer = peer
        self._channel = channel

    def piece_landed(
        self, leg_id: int, first_layer: int, num_layers: int, start: int, num_tokens: int,
        seconds: float, nbytes: int,
    ) -> None:  # fmt: skip
        landed = ranks_pb2.PieceLanded(
            peer=self._peer,
            leg_id=leg_id,
            first_layer=first_layer,
            num_layers=num_layers,
            start=start,
            num_tokens=num_tokens,
            seconds=seconds,
            num_bytes=nbytes,
        )
        self._channel.send(ranks_pb2.RankReport(landed=landed))

    def sends_closed(self, leg_id: int, error: str | None) -> None:
        closed = ranks_pb2.SendsClosed(peer=self._peer, leg_id=leg_id, error=error)
        self._channel.send(ranks_pb2.RankReport(sends_closed=closed))

    def receives_closed(self, leg_id: int) -> None:
        closed = ranks_pb2.ReceivesClosed(peer=self._peer, leg_id=leg_id)
        self._channel.send(ranks_pb2.RankReport(receives_closed=closed))

    def link_failed(self, leg_ids: Sequence[int], reason: str) -> None:
        failed = ranks_pb2.LinkFailed(peer=self._peer, leg_ids=leg_ids, reason=reason)
        self._channel.send(ranks_pb2.RankReport(link_failed=failed))

    def send_control(self, message: worker_pb2.LinkMessage) -> None:
        """A message of a link, to be passed on to the peer."""
        report = ranks_pb2.LinkReport(peer=self._peer, message=message)
        self._channel.send(ranks_pb2.RankReport(link=report))


class FollowerLinks:
    """Used by the thread that reads rank 0's commands."""

    def __init__(
        self,
        rank: int,
        storage: KVStorage,
        config: TandemConfig,
        channel: Channel,
        written: WrittenLayers,
    ) -> None:
        self._rank = rank
        self._storage = storage
        self._config = config
        self._channel = channel
        self._written = written
        self._budget = LinkBudget(config.transfer.max_links)
        self._rendezvous = Rendezvous(config.worker.host)
        self._peers: dict[int, RankLinks] = {}
        self._last = Point(0, 0)
        """The latest point that anything was asked to wait for."""

    def take(self, step: ranks_pb2.TransferStep) -> None:
        """Carry out one command; one about a peer that is gone is late and no concern."""
        kind = step.WhichOneof("kind")
        if kind == "met":
            self._peers[step.peer] = self._meet(step.peer, step.met)
            return
        links = self._peers.get(step.peer)
        if links is None:
            return
        match kind:
            case "link":
                links.handle(step.link)
            case "open_sends":
                links.open_sends(step.open_sends)
            case "send":
                self._send(links, step.send)
            case "finish_sends":
                self._written.when(self._last, lambda _: links.finish_sends(step.finish_sends))
            case "cancel_sends":
                links.cancel_sends(step.cancel_sends)
            case "expect":
                slots = self._slots(step.expect.slots)
                links.expect(step.expect.leg_id, step.expect.start, slots)
            case "close_receives":
                links.close_receives(step.close_receives)
            case "close":
                del self._peers[step.peer]
                links.close()

    def _send(self, links: RankLinks, step: ranks_pb2.SendPiece) -> None:
        slots = self._slots(step.slots)

        layers = (step.first_layer, step.num_layers)

        def send(ready: Ready) -> None:
            links.send(Piece(step.leg_id, step.chunk, *layers, step.start, slots, ready))

        point = Point(step.iteration, sum(layers) - 1)
        self._last = max(self._last, point)
        self._written.when(point, send)

    def _meet(self, peer: int, met: ranks_pb2.PeerMet) -> RankLinks:
        reporter = _Reporter(peer, self._channel)
        return RankLinks(
            rank=self._rank,
            blocks=self._storage,
            ours=met.our_spec,
            theirs=met.kv_spec,
            config=self._config.transfer,
            send_control=reporter.send_control,
            events=reporter,
            peer_name=met.name,
            budget=self._budget,
            rendezvous=self._rendezvous,
        )

    def _slots(self, data: bytes) -> torch.Tensor:
        slots = torch.from_numpy(np.frombuffer(data, dtype=np.int64).copy())
        return slots.to(self._storage.device)
