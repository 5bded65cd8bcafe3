"""The KV links of a worker to its peers, over its blocks on every rank.

Those of ranks other than 0 are `follower_links`, which this end tells what to do.
"""

from __future__ import annotations

from collections.abc import Callable

from tandem.core.config import TandemConfig
from tandem.kvcache.storage import KVStorage
from tandem.tracing.buffer import TraceBuffer
from tandem.transfer import (
    NO_OTHERS,
    LinkBudget,
    OtherRanks,
    RankedTransfer,
    RankLinks,
    Rendezvous,
    TransferEvents,
)
from tandem.v1 import worker_pb2


class WorkerLinks:
    """Makes the links to one peer after the other; all of them share one budget."""

    def __init__(
        self,
        storage: KVStorage,
        kv_spec: worker_pb2.KVSpec,
        config: TandemConfig,
        trace: TraceBuffer,
        others: OtherRanks | None,
    ) -> None:
        """`others`: the worker's other ranks, if it has any."""
        self.budget = LinkBudget(config.transfer.max_links)
        self._storage = storage
        self._kv_spec = kv_spec
        self._config = config.transfer
        self._rendezvous = Rendezvous(config.worker.host)
        self._trace = trace
        self._others = others or NO_OTHERS

    def to_peer(
        self, send_control: Callable[[worker_pb2.LinkMessage], None], events: TransferEvents
    ) -> RankedTransfer:
        """Return all KV traffic with one peer; `send_control` takes its messages there."""

        def make_links(
            name: str, theirs: worker_pb2.KVSpec, own_events: TransferEvents
        ) -> RankLinks:
            return RankLinks(
                rank=0,
                blocks=self._storage,
                ours=self._kv_spec,
                theirs=theirs,
                config=self._config,
                send_control=send_control,
                events=own_events,
                peer_name=name,
                budget=self.budget,
                rendezvous=self._rendezvous,
                trace=self._trace,
            )

        return RankedTransfer(self._kv_spec, make_links, send_control, events, self._others)
