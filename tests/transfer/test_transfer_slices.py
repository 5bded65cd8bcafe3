"""Which heads go between which ranks, and that they arrive where they belong."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from transfer_endpoint import WAIT_SECONDS, EventLog, TorchBlocks

from tandem.core.config import TransferConfig
from tandem.core.errors import PeerMismatchError
from tandem.kvcache.heads import HeadRange, heads_of
from tandem.kvcache.storage import KVStorage
from tandem.transfer import (
    LinkBudget,
    Piece,
    RankedTransfer,
    RankLinks,
    Rendezvous,
    check_kv_spec,
    make_kv_spec,
)
from tandem.transfer.head_blocks import head_blocks
from tandem.transfer.receive_ledger import PieceRange
from tandem.transfer.slice_ledger import SliceLedger
from tandem.transfer.slices import head_slices
from tandem.v1 import worker_pb2

DEGREES = (1, 2, 3, 4, 6, 8, 12)


def fits(degree: int, heads: int) -> bool:
    return heads % degree == 0 or degree % heads == 0


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 8])
def test_every_receiver_gets_each_of_its_heads_once_from_a_rank_that_holds_it(heads: int) -> None:
    degrees = [degree for degree in DEGREES if fits(degree, heads)]
    for senders, receivers in itertools.product(degrees, repeat=2):
        got: dict[int, list[int]] = {receiver: [] for receiver in range(receivers)}
        for part in head_slices(heads, senders, receivers):
            carried = range(part.heads.first, part.heads.first + part.heads.num_heads)
            held = heads_of(part.sender, senders, heads)
            assert set(carried) <= set(range(held.first, held.first + held.num_heads))
            got[part.receiver].extend(carried)
        for receiver, found in got.items():
            wanted = heads_of(receiver, receivers, heads)
            assert sorted(found) == list(range(wanted.first, wanted.first + wanted.num_heads))


def test_receivers_are_spread_over_the_ranks_that_hold_the_same_head() -> None:
    assert {part.sender for part in head_slices(2, 4, 4)} == {0, 1, 2, 3}


def test_degrees_that_the_heads_do_not_divide_over_are_refused() -> None:
    config, blocks = TransferConfig(), TorchBlocks()
    ours = make_kv_spec("m", "r", blocks, config, num_kv_heads=4, tensor_parallel=2)
    theirs = make_kv_spec("m", "r", blocks, config, num_kv_heads=4, tensor_parallel=4)
    check_kv_spec(ours, theirs)
    theirs.tensor_parallel = 3
    with pytest.raises(PeerMismatchError) as refused:
        check_kv_spec(ours, theirs)
    assert refused.value.message == (
        "tensor_parallel is 3 there, over 4 KV heads: one must divide the other"
    )


@pytest.mark.parametrize(("first", "count"), [(0, 6), (0, 3), (3, 3), (2, 2), (1, 1), (3, 2)])
def test_a_range_of_heads_is_packed_and_scattered_alone(first: int, count: int) -> None:
    held = HeadRange(6, 6)  # the second rank of a model of 12 heads
    source, target = storage(6), storage(6)
    source.kv.normal_(generator=torch.Generator().manual_seed(1))
    before = target.kv.normal_(generator=torch.Generator().manual_seed(2)).clone()
    slots, there = torch.tensor([3, 17, 4, 30]), torch.tensor([8, 9, 31, 0])
    heads = HeadRange(6 + first, count)
    packed = head_blocks(source, heads, held).pack(1, 2, slots)
    assert torch.equal(packed, source.pack(1, 2, slots)[:, :, :, first : first + count])
    out = torch.empty_like(packed)
    head_blocks(source, heads, held).pack(1, 2, slots, out)
    assert torch.equal(out, packed)
    head_blocks(target, heads, held).unpack(1, 2, there, packed)
    expected = before.contiguous()
    flat = expected[1:3].flatten(2, 3)
    flat[:, :, there, first : first + count] = packed
    assert torch.equal(target.kv, expected)


def storage(heads: int) -> KVStorage:
    return KVStorage(3, 8, 4, heads, 2, torch.float32, "cpu")


def test_a_piece_has_landed_when_every_slice_has_and_a_leg_closes_once() -> None:
    ledger = SliceLedger(send_links=2, receive_links=3)
    piece = PieceRange(7, 0, 1, 0, 4)
    assert ledger.landed(piece, 0.1, 10) is None  # nobody expects it
    ledger.expect(7)
    assert ledger.landed(piece, 0.1, 10) is None
    assert ledger.landed(piece._replace(start=4), 0.1, 10) is None
    assert ledger.landed(piece, 0.3, 10) is None
    assert ledger.landed(piece, 0.2, 10) == (piece, 0.3, 30)
    assert [ledger.receives_closed(7) for _ in range(4)] == [False, False, True, False]
    ledger.open_sends(7)
    with pytest.raises(ValueError, match="already open"):
        ledger.open_sends(7)
    assert ledger.sends_closed(7, "broken") == (False, "broken")
    assert ledger.sends_closed(7, None) == (True, "broken")
    assert ledger.idle


class RankedEnd:
    """A worker whose ranks live in one process: rank 0's `RankedTransfer` and the others' links.

    Stands in for the connections between ranks (`OtherRanks`): every step is carried out at once.
    """

    def __init__(self, ranks: int, heads: int, seed: int | None) -> None:
        self.heads = heads
        self.config = TransferConfig(transfer_timeout=WAIT_SECONDS)
        share = heads_of(0, ranks, heads).num_heads
        self.blocks = [storage(share) for _ in range(ranks)]
        if seed is not None:
            whole = torch.randn(3, 2, 8, 4, heads, 2, generator=torch.Generator().manual_seed(seed))
            for rank, blocks in enumerate(self.blocks):
                first, count = heads_of(rank, ranks, heads)
                blocks.kv.copy_(whole[..., first : first + count, :])
        self.spec = make_kv_spec("m", "r", self.blocks[0], self.config, heads, ranks)
        self.events = EventLog()
        self.iteration = 0
        self.links: dict[int, RankLinks] = {}
        self.left: list[int] = []
        self.deliver: Callable[[worker_pb2.LinkMessage], None] = lambda message: None
        self.budgets = [LinkBudget(8) for _ in self.blocks]
        self.rendezvous = [Rendezvous("127.0.0.1") for _ in self.blocks]
        self.transfer = RankedTransfer(
            self.spec, self._own_links, self._send, self.events, others=self
        )

    @property
    def whole(self) -> torch.Tensor:
        """Every head, [layers, 2, slots, heads, dim]; of one of the ranks that hold it."""
        kv = torch.zeros(3, 2, 8, 4, self.heads, 2)
        for rank, blocks in enumerate(self.blocks):
            first, count = heads_of(rank, len(self.blocks), self.heads)
            kv[..., first : first + count, :] = blocks.kv
        return kv.flatten(2, 3)

    def _send(self, message: worker_pb2.LinkMessage) -> None:
        self.deliver(worker_pb2.LinkMessage.FromString(message.SerializeToString()))

    def _make(self, rank, name, theirs, events) -> RankLinks:
        return RankLinks(
            *(rank, self.blocks[rank], self.spec, theirs, self.config, self._send, events, name),
            *(self.budgets[rank], self.rendezvous[rank]),
        )

    def _own_links(self, name, theirs, events) -> RankLinks:
        for rank in range(1, len(self.blocks)):
            self.links[rank] = self._make(rank, name, theirs, events)
        return self._make(0, name, theirs, events)

    # -- `OtherRanks`

    def enter(self, transfer: RankedTransfer) -> int:
        return 1

    def leave(self, peer: int) -> None:
        self.left.append(peer)

    def relay(self, peer: int, message: worker_pb2.LinkMessage) -> None:
        self.links[message.to_rank].handle(message)

    def tell(self, step) -> None:
        for links in self.links.values():
            match step.WhichOneof("kind"):
                case "send":
                    sent = step.send
                    slots = torch.frombuffer(bytearray(sent.slots), dtype=torch.int64)
                    piece = (sent.leg_id, sent.chunk, sent.first_layer, sent.num_layers, sent.start)
                    links.send(Piece(*piece, slots))
                case "expect":
                    slots = torch.frombuffer(bytearray(step.expect.slots), dtype=torch.int64)
                    links.expect(step.expect.leg_id, step.expect.start, slots)
                case "close":
                    links.close()
                case "open_sends" | "finish_sends" | "cancel_sends" | "close_receives" as kind:
                    getattr(links, kind)(getattr(step, kind))


@pytest.mark.parametrize(
    ("heads", "senders", "receivers"),
    [(4, 1, 1), (4, 2, 1), (4, 1, 2), (4, 4, 2), (2, 4, 4), (2, 2, 4), (6, 3, 2), (1, 2, 1)],
)
def test_kv_goes_between_workers_of_any_degrees(heads: int, senders: int, receivers: int) -> None:
    near, far = RankedEnd(senders, heads, seed=1), RankedEnd(receivers, heads, seed=None)
    near.deliver, far.deliver = far.transfer.handle, near.transfer.handle
    slots, there = torch.tensor([5, 6, 20, 31]), torch.tensor([1, 30, 2, 9])
    far.transfer.expect(1, 0, there)  # before it has heard who its peer is
    far.transfer.meet("near", near.spec)
    near.transfer.meet("far", far.spec)
    near.transfer.open_sends(1)
    for layer in range(3):
        near.transfer.send(Piece(1, 0, layer, 1, 0, slots))
    near.transfer.finish_sends(1)
    far.events.wait_landed(3)
    near.events.wait_sent(1)
    assert far.events.landed == [(1, layer, 1, 0, 4) for layer in range(3)]
    expected = torch.zeros_like(far.whole)
    expected[:, :, there] = near.whole[:, :, slots]
    assert torch.equal(far.whole, expected)
    for rank, blocks in enumerate(far.blocks):  # also the copies of a shared head
        first, count = heads_of(rank, receivers, heads)
        assert torch.equal(blocks.kv.flatten(2, 3), expected[..., first : first + count, :])
    far.transfer.finish_receives(1)
    far.events.wait_for(lambda: far.events.receives == [1])
    for end in (near, far):
        end.transfer.close()
        assert end.left == [1]
    assert near.events.sends == [(1, None)]


def test_what_was_asked_of_a_peer_that_never_came_closes_once() -> None:
    end = RankedEnd(2, 4, seed=None)
    end.transfer.expect(1, 0, torch.tensor([0]))
    end.transfer.open_sends(2)
    end.transfer.close()
    end.transfer.expect(3, 0, torch.tensor([1]))
    end.transfer.meet("late", end.spec)
    assert end.events.receives == [1, 3]
    assert end.events.send_error(2) == "the connection to the peer closed"
    assert end.left == [1]
