"""Two real processes: KV crosses, and a killed or frozen peer does not hurt the one that lives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from transfer_endpoint import WAIT_SECONDS, Endpoint, TorchBlocks
from transfer_process import PeerProcess

from tandem.core.config import TransferConfig

PATIENT = TransferConfig(connect_timeout=1000, transfer_timeout=1000)
"""Whoever waits for one of these time-outs fails the test."""
LARGE = {"num_layers": 4, "num_blocks": 1024, "block_size": 16}
"""8 MB of KV: more than the sockets of a frozen peer take."""

Start = Callable[..., PeerProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts child processes; none of them, and no thread, outlives the test."""
    before = set(threading.enumerate())
    peers: list[PeerProcess] = []

    def make(*arguments: object) -> PeerProcess:
        peers.append(PeerProcess(*arguments))  # type: ignore[arg-type]
        return peers[-1]

    yield make
    for peer in peers:
        peer.kill()
        assert peer.transfer.join(WAIT_SECONDS)
    assert set(threading.enumerate()) <= before


def stream(here: Endpoint, peer: PeerProcess, leg: int, pieces: int) -> None:
    """Send slots [0, pieces) to the child's same slots; the leg stays open for more."""
    peer.tell("expect", leg, 0, list(range(pieces)))
    here_leg = peer.transfer
    here_leg.open_sends(leg)
    for slot in range(pieces):
        here_leg.send(here.piece(leg, [slot], slot))


def test_kv_crosses_between_processes_both_ways(start: Start) -> None:
    here = Endpoint("parent", TorchBlocks(seed=1))
    peer = start(here, {"seed": 2})
    theirs = TorchBlocks(seed=2).kv.flatten(2, 3)
    expected_there = theirs.clone()
    expected_there[:, :, :24] = here.blocks.flat(0, 4)[:, :, :24]
    stream(here, peer, 1, 24)
    peer.transfer.finish_sends(1)
    peer.transfer.expect(2, 8, here.slots(range(63, 39, -1)))
    peer.tell("open_sends", 2)
    for start_token in range(0, 24, 6):
        peer.tell("piece", 2, list(range(40 + start_token, 46 + start_token)), 8 + start_token)
    peer.tell("finish_sends", 2)
    here.events.wait_sent(1)
    peer.events.wait_sent(2)
    assert here.events.send_error(1) is None
    assert peer.events.send_error(2) is None
    assert torch.equal(peer.read_kv().flatten(2, 3), expected_there)
    assert torch.equal(here.blocks.flat(0, 4)[:, :, 40:].flip(2), theirs[:, :, 40:])


def test_a_killed_peer_closes_every_leg_and_hangs_nothing(start: Start) -> None:
    here = Endpoint("parent", TorchBlocks(seed=1), PATIENT)
    peer = start(here)
    peer.transfer.expect(9, 0, here.slots(range(4)))
    stream(here, peer, 1, 60)
    peer.transfer.open_sends(2)
    peer.events.wait_landed(1)
    peer.kill()
    assert here.events.send_error(1) is not None
    assert here.events.send_error(2) is not None
    assert here.events.receives == [9]
    assert peer.transfer.join(WAIT_SECONDS)
    assert here.budget.num_open == 0


def test_a_killed_sender_closes_what_was_expected_of_it(start: Start) -> None:
    here = Endpoint("parent", TorchBlocks(), PATIENT)
    peer = start(here, {"seed": 1})
    peer.transfer.expect(1, 0, here.slots(range(60)))
    peer.tell("open_sends", 1)
    for slot in range(60):
        peer.tell("piece", 1, [slot], slot)
    here.events.wait_landed(1)
    peer.kill()
    assert here.events.receives == [1]
    assert peer.transfer.join(WAIT_SECONDS)


@pytest.mark.parametrize("frozen", ["before_the_link_opens", "mid_stream"])
def test_a_frozen_peer_blocks_no_caller_and_close_does_not_wait_for_it(
    start: Start, frozen: str
) -> None:
    here = Endpoint("parent", TorchBlocks(**LARGE, seed=1), PATIENT)
    peer = start(here, LARGE)
    if frozen == "mid_stream":
        stream(here, peer, 1, 2)
        peer.transfer.finish_sends(1)
        here.events.wait_sent(1)
        peer.announced.clear()
    peer.transfer.open_sends(3)
    peer.freeze()
    peer.transfer.send(here.piece(3, range(1024 * 16)))
    if frozen == "mid_stream":
        assert peer.announced.wait(WAIT_SECONDS)
    peer.transfer.finish_sends(3)
    peer.transfer.cancel_sends(3)
    peer.transfer.expect(2, 0, here.slots([0]))
    peer.transfer.close()
    assert [leg for leg, _ in here.events.sends if leg == 3] == [3]
    assert here.events.receives == [2]
    assert peer.transfer.join(WAIT_SECONDS)


def test_a_process_leaves_with_links_open(start: Start) -> None:
    here = Endpoint("parent", TorchBlocks(seed=1))
    peer = start(here)
    stream(here, peer, 1, 2)
    peer.events.wait_landed(2)
    peer.transfer.expect(2, 0, here.slots([5]))
    peer.tell("open_sends", 2)
    peer.tell("piece", 2, [0])
    here.events.wait_landed(1)
    peer.tell("open_sends", 3)
    for _ in range(50):
        peer.tell("piece", 3, [0])
    peer.tell("exit")
    assert peer.process.wait(WAIT_SECONDS) == 0
