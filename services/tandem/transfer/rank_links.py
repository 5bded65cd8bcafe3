"""All KV traffic of one rank with one peer: a pair of links to each of the peer's ranks.

Carries out what it is told, on every link that it concerns; what its links report is put together
elsewhere (`ranked`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tandem.core.config import TransferConfig
from tandem.kvcache.heads import heads_of
from tandem.tracing.buffer import TraceBuffer
from tandem.transfer.budget import LinkBudget
from tandem.transfer.group import Rendezvous
from tandem.transfer.head_blocks import head_blocks
from tandem.transfer.peer import PeerTransfer
from tandem.transfer.slices import head_slices
from tandem.transfer.types import KVBlocks, Piece, TransferEvents
from tandem.v1 import worker_pb2


class RankLinks:
    """Made once the peer's `KVSpec` is known. Thread-safe and non-blocking, as its links are."""

    def __init__(
        self,
        rank: int,
        blocks: KVBlocks,
        ours: worker_pb2.KVSpec,
        theirs: worker_pb2.KVSpec,
        config: TransferConfig,
        send_control: Callable[[worker_pb2.LinkMessage], None],
        events: TransferEvents,
        peer_name: str,
        budget: LinkBudget,
        rendezvous: Rendezvous,
        trace: TraceBuffer | None = None,
    ) -> None:
        """`blocks`: this rank's own, of its share of the heads. `send_control` as in
        `PeerTransfer`; its messages say between which ranks they are. `trace` records the link to
        the peer's rank 0: a piece is one event, however many ranks it goes to."""
        heads, sizes = ours.num_kv_heads, (ours.tensor_parallel, theirs.tensor_parallel)
        sent = [s for s in head_slices(heads, *sizes) if s.sender == rank]
        received = [s for s in head_slices(heads, *reversed(sizes)) if s.receiver == rank]
        self.sends_to = tuple(part.receiver for part in sent)
        self.receives_from = tuple(part.sender for part in received)
        shares = {part.receiver: part.heads for part in sent}
        shares.update({part.sender: part.heads for part in received})
        held = heads_of(rank, sizes[0], heads)
        self._links: dict[int, PeerTransfer] = {}
        for peer_rank, share in shares.items():

            def send(message: worker_pb2.LinkMessage, to_rank: int = peer_rank) -> None:
                message.from_rank, message.to_rank = rank, to_rank
                send_control(message)

            self._links[peer_rank] = PeerTransfer(
                storage=head_blocks(blocks, share, held),
                spec=ours,
                config=config,
                send_control=send,
                events=events,
                peer_name=f"{peer_name}/{peer_rank}" if peer_rank else peer_name,
                budget=budget,
                rendezvous=rendezvous,
                trace=None if peer_rank else trace,
            )

    def handle(self, message: worker_pb2.LinkMessage) -> None:
        """Take a message that a rank of the peer sent to this one."""
        if link := self._links.get(message.from_rank):
            link.handle(message)

    def open_sends(self, leg_id: int) -> None:
        for rank in self.sends_to:
            self._links[rank].open_sends(leg_id)

    def send(self, piece: Piece) -> None:
        for rank in self.sends_to:
            self._links[rank].send(piece)

    def finish_sends(self, leg_id: int) -> None:
        for rank in self.sends_to:
            self._links[rank].finish_sends(leg_id)

    def cancel_sends(self, leg_id: int) -> None:
        for rank in self.sends_to:
            self._links[rank].cancel_sends(leg_id)

    def expect(self, leg_id: int, start: int, slots: torch.Tensor) -> None:
        for rank in self.receives_from:
            self._links[rank].expect(leg_id, start, slots)

    def close_receives(self, leg_id: int) -> None:
        """Nothing more is wanted, or everything has landed."""
        for rank in self.receives_from:
            self._links[rank].finish_receives(leg_id)

    def close(self) -> None:
        """The peer is gone."""
        for link in self._links.values():
            link.close()
