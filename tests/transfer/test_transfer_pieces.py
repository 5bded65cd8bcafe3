"""KV arrives in exactly the right blocks, in order, whatever happens to the legs beside it."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from transfer_endpoint import Endpoint, TorchBlocks
from transfer_pair import Connect

from tandem.core.config import TransferConfig
from tandem.kvcache.storage import KVStorage
from tandem.transfer import Piece, TransferStats


def ragged(rng: random.Random, total: int) -> list[tuple[int, int]]:
    """[0, total) cut into ranges at random places."""
    cuts = sorted(rng.sample(range(1, total), rng.randint(0, min(4, total - 1))))
    return list(zip([0, *cuts], [*cuts, total], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_bytes_land_in_exactly_the_right_blocks(
    connect: Connect, devices: tuple[str, str], dtype: torch.dtype, seed: int
) -> None:
    rng = random.Random(seed)
    source = Endpoint("p", TorchBlocks(dtype=dtype, seed=seed, device=devices[0]))
    target = Endpoint("d", TorchBlocks(dtype=dtype, device=devices[1]))
    pair = connect(source, target)
    layers, slots = source.blocks.kv.shape[0], 64
    expected = target.blocks.kv.cpu().clone()
    taken = rng.sample(range(slots), slots)
    pieces = 0
    for leg, offset in ((1, 0), (2, 30)):
        start, count = rng.randint(0, 40), rng.randint(8, 30)
        from_slots = rng.sample(range(slots), count)
        into_slots = taken[offset : offset + count]
        pair.far.expect(leg, start, target.slots(into_slots))
        pair.near.open_sends(leg)
        for first, last in ragged(rng, count):
            for low, high in ragged(rng, layers):
                pair.near.send(
                    source.piece(leg, from_slots[first:last], start + first, low, high - low)
                )
                pieces += 1
        pair.near.finish_sends(leg)
        wanted = source.blocks.flat(0, layers)[:, :, from_slots]
        expected.flatten(2, 3)[:, :, into_slots] = wanted.cpu()
    source.events.wait_sent(1, 2)
    assert len(target.events.landed) == pieces
    assert source.events.send_error(1) is None
    assert torch.equal(target.blocks.kv.cpu(), expected)
    pair.close()
    stats = pair.far.stats()
    assert stats.pieces_landed == pieces == pair.near.stats().pieces_sent
    assert stats.bytes_received == target.events.landed_bytes == pair.near.stats().bytes_sent


def test_pieces_land_in_the_order_in_which_they_were_sent(connect: Connect) -> None:
    source, target = Endpoint("p"), Endpoint("d")
    pair = connect(source, target)
    rng = random.Random(7)
    sent = []
    for leg in (1, 2, 3):
        pair.far.expect(leg, 0, target.slots(range(20)))
        pair.near.open_sends(leg)
    for start in range(20):
        leg = rng.choice((1, 2, 3))
        pair.near.send(source.piece(leg, [start], start))
        sent.append((leg, 0, 4, start, 1))
    target.events.wait_landed(20)
    assert target.events.landed == sent


def test_small_pieces_that_wait_share_sends_and_land_one_by_one(connect: Connect) -> None:
    source, target = Endpoint("p", TorchBlocks(seed=1)), Endpoint("d")
    pair = connect(source, target)
    pair.far.expect(1, 0, target.slots(range(64)))
    pair.near.open_sends(1)
    for start in range(64):  # all of them wait while the link opens
        pair.near.send(source.piece(1, [start], start))
    pair.near.finish_sends(1)
    source.events.wait_sent(1)
    assert [start for _, _, _, start, _ in target.events.landed] == list(range(64))
    assert torch.equal(target.blocks.kv, source.blocks.kv)
    assert sum(message.HasField("announce") for message in pair.to_far.seen) < 64
    assert sum(message.HasField("ack") for message in pair.to_near.seen) < 64


def test_both_directions_run_at_once(connect: Connect, devices: tuple[str, str]) -> None:
    ends = [Endpoint(name, TorchBlocks(seed=i, device=devices[i])) for i, name in enumerate("pd")]
    pair = connect(*ends)
    before = [end.blocks.kv.cpu().clone() for end in ends]
    sides = ((pair.near, pair.far, ends[0], ends[1], 1), (pair.far, pair.near, ends[1], ends[0], 2))
    for _, receiver, _, into, leg in sides:
        receiver.expect(leg, 0, into.slots(range(32, 64)))
    for sender, _, source, _, leg in sides:
        sender.open_sends(leg)
        for start in range(32):
            sender.send(source.piece(leg, [start], start))
        sender.finish_sends(leg)
    ends[0].events.wait_sent(1)
    ends[1].events.wait_sent(2)
    for here, there in ((0, 1), (1, 0)):
        landed = ends[here].blocks.flat(0, 4)[:, :, 32:].cpu()
        assert torch.equal(landed, before[there].flatten(2, 3)[:, :, :32])
    assert pair.near.num_open_links == pair.far.num_open_links == 2


def test_a_cancelled_leg_drains_and_does_not_block_the_others(connect: Connect) -> None:
    source, target = Endpoint("p", TorchBlocks(seed=1)), Endpoint("d")
    pair = connect(source, target)
    pair.far.expect(1, 0, target.slots(range(8)))
    pair.far.expect(2, 0, target.slots(range(8, 16)))
    pair.far.cancel_receives(1)
    assert target.events.receives == [1]
    for leg in (1, 2):
        pair.near.open_sends(leg)
    for start in range(8):
        for leg in (1, 2):
            pair.near.send(source.piece(leg, [start], start))
    for leg in (1, 2):
        pair.near.finish_sends(leg)
    source.events.wait_sent(1, 2)
    assert [leg for leg, *_ in target.events.landed] == [2] * 8
    assert not target.blocks.flat(0, 4)[:, :, :8].any()
    assert pair.far.stats().pieces_drained == 8
    pair.far.cancel_receives(1)
    pair.far.finish_receives(2)
    assert target.events.receives == [1, 2]


def test_a_leg_cancelled_during_its_scatter_closes_after_it(connect: Connect) -> None:
    source, target = Endpoint("p", TorchBlocks(seed=1)), Endpoint("d")
    pair = connect(source, target)
    scattering, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        scattering.set()
        assert go_on.wait(20)

    target.blocks.before_unpack = hold
    pair.far.expect(1, 0, target.slots(range(4)))
    pair.near.open_sends(1)
    pair.near.send(source.piece(1, range(4)))
    assert scattering.wait(20)
    pair.far.cancel_receives(1)
    assert target.events.receives == []
    go_on.set()
    target.events.wait_for(lambda: target.events.receives == [1])


def test_cancelled_sends_drop_what_is_not_on_the_wire(connect: Connect) -> None:
    source, target = Endpoint("p", TorchBlocks(seed=1)), Endpoint("d")
    pair = connect(source, target)
    scattering, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        scattering.set()
        assert go_on.wait(20)

    target.blocks.before_unpack = hold
    pair.far.expect(1, 0, target.slots([0] * 400))
    pair.near.open_sends(1)
    for start in range(400):
        pair.near.send(source.piece(1, [0], start))
    assert scattering.wait(20)
    pair.near.cancel_sends(1)
    assert source.events.sends == []
    go_on.set()
    source.events.wait_sent(1)
    assert source.events.send_error(1) is None
    announced = [
        each
        for m in pair.to_far.seen
        if m.HasField("announce")
        for each in (m.announce, *m.announce.more)
    ]
    assert len(announced) < 400
    assert pair.far.stats().pieces_landed == len(announced)


def test_a_piece_outside_what_was_expected_fails_only_its_leg(connect: Connect) -> None:
    source, target = Endpoint("p", TorchBlocks(seed=1)), Endpoint("d")
    pair = connect(source, target)
    pair.far.expect(1, 8, target.slots(range(4)))
    pair.far.expect(2, 0, target.slots(range(4, 8)))
    for leg in (1, 2):
        pair.near.open_sends(leg)
    pair.near.send(source.piece(1, range(4), start=10))
    pair.near.send(source.piece(2, range(4)))
    target.events.wait_landed(1)
    assert target.events.failures == [((1,), "leg 1 expects tokens 8..12, got 10..14")]
    assert target.events.landed == [(2, 0, 4, 0, 4)]
    assert not target.blocks.flat(0, 4)[:, :, :4].any()


def test_a_piece_that_cannot_be_packed_fails_only_its_leg(connect: Connect) -> None:
    source, target = Endpoint("p", TorchBlocks(seed=1)), Endpoint("d")
    pair = connect(source, target)
    for leg in (1, 2):
        pair.far.expect(leg, 0, target.slots(range(4)))
        pair.near.open_sends(leg)
    pair.near.send(source.piece(1, [10_000]))
    pair.near.send(source.piece(2, range(4)))
    pair.near.finish_sends(2)
    source.events.wait_sent(1, 2)
    assert "could not be packed" in (source.events.send_error(1) or "")
    assert source.events.send_error(2) is None
    assert [legs for legs, _ in source.events.failures] == [(1,)]
    assert target.events.landed == [(2, 0, 4, 0, 4)]


def test_a_leg_without_pieces_closes_when_it_is_finished(connect: Connect) -> None:
    source, target = Endpoint("p"), Endpoint("d")
    pair = connect(source, target)
    pair.near.open_sends(1)
    pair.near.finish_sends(1)
    assert source.events.sends == [(1, None)]
    assert pair.near.num_open_links == 0
    assert pair.near.stats() == TransferStats()


def test_pieces_larger_than_any_socket_buffer(connect: Connect) -> None:
    config = TransferConfig()
    source = Endpoint("p", TorchBlocks(8, 256, 16, seed=3), config)
    target = Endpoint("d", TorchBlocks(8, 256, 16), config)
    pair = connect(source, target)
    count = 256 * 16
    pair.far.expect(1, 0, target.slots(list(reversed(range(count)))))
    pair.near.open_sends(1)
    pair.near.send(source.piece(1, range(count)))
    pair.near.finish_sends(1)
    source.events.wait_sent(1)
    assert torch.equal(target.blocks.flat(0, 8), source.blocks.flat(0, 8).flip(2))


def test_the_blocks_of_the_engine(connect: Connect, devices: tuple[str, str]) -> None:
    """The real storage, through block tables that differ on both sides."""
    stores = [KVStorage(3, 12, 4, 2, 8, torch.float32, device) for device in devices]
    stores[0].kv.normal_(generator=torch.Generator(devices[0]).manual_seed(5))
    source, target = (Endpoint(name, blocks) for name, blocks in zip("pd", stores, strict=True))
    pair = connect(source, target)
    there, here = [7, 2, 9, 4], [0, 11, 5, 3]
    pair.far.expect(1, 3, stores[1].slots(here, 3, 14))
    pair.near.open_sends(1)
    for first_layer, num_layers in ((0, 2), (2, 1)):
        slots = stores[0].slots(there, 3, 14)
        pair.near.send(Piece(1, 0, first_layer, num_layers, 3, slots))
    pair.near.finish_sends(1)
    source.events.wait_sent(1)
    for layer in range(3):
        for side in (0, 1):
            sent, landed = (store.layer(layer)[side].cpu() for store in stores)
            assert torch.equal(sent[there].flatten(0, 1)[3:14], landed[here].flatten(0, 1)[3:14])
            assert not landed[here].flatten(0, 1)[:3].any()
            assert not landed[[1, 2, 4, 6, 7, 8, 9, 10]].any()
