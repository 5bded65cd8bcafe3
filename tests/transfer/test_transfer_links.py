"""Links break, are refused, evicted and closed: legs close exactly once and nothing hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from transfer_endpoint import Endpoint, TorchBlocks
from transfer_pair import Connect, Pair

from tandem.core.config import TransferConfig
from tandem.core.errors import PeerMismatchError
from tandem.transfer import PeerTransfer, check_kv_spec
from tandem.v1 import worker_pb2


def send_range(pair: Pair, leg: int, count: int, *, finish: bool = True) -> None:
    """Send slots [0, count) of the near end, one piece each, to the same slots of the far end."""
    pair.far.expect(leg, 0, pair.far_end.slots(range(count)))
    pair.near.open_sends(leg)
    for start in range(count):
        pair.near.send(pair.near_end.piece(leg, [start], start))
    if finish:
        pair.near.finish_sends(leg)


class Hold:
    """Stops a scatter at its start until the test lets it go on."""

    def __init__(self, blocks: TorchBlocks) -> None:
        self._entered, self._released = threading.Event(), threading.Event()
        blocks.before_unpack = self._wait

    def _wait(self) -> None:
        self._entered.set()
        assert self._released.wait(20)

    def entered(self) -> None:
        assert self._entered.wait(20)

    def release(self) -> None:
        self._released.set()


def break_wire(transfer: PeerTransfer, link: str) -> None:
    """Kill one side's group under the link, as a lost connection would."""
    group = transfer._sends._state.group if link == "_sends" else transfer._receives._group
    assert group is not None
    group.abort()


# ---------------------------------------------------------------- refusal


def test_the_check_names_every_field_that_differs_and_both_values() -> None:
    ours = Endpoint("p").spec
    check_kv_spec(ours, Endpoint("d").spec)
    theirs = Endpoint("d", TorchBlocks(block_size=8), revision="r2").spec
    theirs.protocol_version = 9
    with pytest.raises(PeerMismatchError) as refusal:
        check_kv_spec(ours, theirs)
    for part in (
        "revision is 'r1' here and 'r2' there",
        "block_size is 4 here and 8 there",
        "protocol_version is 3 here and 9 there",
    ):
        assert part in str(refusal.value)


def test_a_mismatched_peer_is_refused_once_and_both_values_are_named(connect: Connect) -> None:
    pair = connect(Endpoint("p"), Endpoint("d", TorchBlocks(block_size=8)))
    send_range(pair, 1, 2)
    pair.near_end.events.wait_sent(1)
    reason = "block_size is 8 here and 4 there"
    assert reason in (pair.near_end.events.send_error(1) or "")
    assert [legs for legs, why in pair.near_end.events.failures if reason in why] == [(1,)]
    assert [legs for legs, why in pair.far_end.events.failures if reason in why] == [(1,)]
    assert sum(m.HasField("open") for m in pair.to_far.seen) == 1
    assert pair.near.stats().retries == 0


# ---------------------------------------------------------------- epochs


def test_messages_of_another_epoch_are_refused_and_counted(connect: Connect) -> None:
    pair = connect(Endpoint("p", TorchBlocks(seed=1)), Endpoint("d"))
    send_range(pair, 1, 2, finish=False)
    pair.far_end.events.wait_landed(2)
    announce = worker_pb2.LinkAnnounce(sequence_number=3, leg_id=1, num_layers=4, num_tokens=1)
    for epoch in (0, 2):
        pair.far.handle(worker_pb2.LinkMessage(epoch=epoch, announce=announce))
    pair.far.handle(worker_pb2.LinkMessage(epoch=1, open=worker_pb2.LinkOpen()))
    pair.near.handle(
        worker_pb2.LinkMessage(to_opener=True, epoch=7, ack=worker_pb2.LinkAck(sequence_number=2))
    )
    assert pair.far.stats().stale_messages == 3
    assert pair.near.stats().stale_messages == 1
    pair.near.finish_sends(1)
    pair.near_end.events.wait_sent(1)
    assert pair.near_end.events.send_error(1) is None


@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_a_broken_link_is_rebuilt_and_resends_what_was_not_acknowledged(
    connect: Connect, devices: tuple[str, str], side: str
) -> None:
    pair = connect(
        Endpoint("p", TorchBlocks(num_blocks=64, seed=1, device=devices[0])),
        Endpoint("d", TorchBlocks(num_blocks=64, device=devices[1])),
    )
    hold = Hold(pair.far_end.blocks)
    send_range(pair, 1, 200)  # more than there is staging for
    hold.entered()
    if side == "sender":
        break_wire(pair.near, "_sends")
    else:
        break_wire(pair.far, "_receives")
    hold.release()
    pair.near_end.events.wait_sent(1)
    assert pair.near_end.events.send_error(1) is None
    assert pair.near_end.events.failures == []
    landed = [start for _, _, _, start, _ in pair.far_end.events.landed]
    assert sorted(landed) == list(range(200)), "each piece lands exactly once"
    slots = slice(0, 200)
    assert torch.equal(
        pair.far_end.blocks.flat(0, 4)[:, :, slots].cpu(),
        pair.near_end.blocks.flat(0, 4)[:, :, slots].cpu(),
    )
    assert pair.near.stats().retries >= 1


def test_a_lost_acknowledgement_does_not_land_a_piece_twice(connect: Connect) -> None:
    config = TransferConfig(transfer_timeout=0.2)
    pair = connect(Endpoint("p", TorchBlocks(seed=1), config), Endpoint("d", config=config))
    pair.to_near.passes = lambda message: not (message.HasField("ack") and message.epoch == 1)
    send_range(pair, 1, 3)
    pair.near_end.events.wait_sent(1)
    assert pair.near_end.events.send_error(1) is None
    assert len(pair.far_end.events.landed) == 3
    assert pair.far.stats().pieces_drained == 3


def test_an_announcement_out_of_order_breaks_the_link_and_it_recovers(connect: Connect) -> None:
    pair = connect(Endpoint("p", TorchBlocks(seed=1)), Endpoint("d"))
    send_range(pair, 1, 4, finish=False)
    pair.far_end.events.wait_landed(4)
    announce = worker_pb2.LinkAnnounce(sequence_number=9, leg_id=1, num_layers=4, num_tokens=1)
    pair.far.handle(worker_pb2.LinkMessage(epoch=1, announce=announce))
    pair.near.send(pair.near_end.piece(1, [0], 0))
    pair.near.send(pair.near_end.piece(1, [4], 0, 1, 1))
    pair.near.finish_sends(1)
    pair.near_end.events.wait_sent(1)
    assert pair.near_end.events.send_error(1) is None
    assert len(pair.far_end.events.landed) == 5, "what had landed before is not landed again"
    broken = [m.broken.reason for m in pair.to_near.seen if m.HasField("broken")]
    assert broken == ["piece 9 announced, 5 was next"]


def test_a_link_that_stays_broken_fails_its_legs_and_later_legs_try_again(
    connect: Connect,
) -> None:
    config = TransferConfig(connect_timeout=0.2, max_retries=2)
    pair = connect(Endpoint("p", TorchBlocks(seed=1), config), Endpoint("d"))
    pair.to_near.passes = lambda message: False
    send_range(pair, 1, 2)
    pair.near_end.events.wait_sent(1)
    assert "3 times in a row" in (pair.near_end.events.send_error(1) or "")
    assert [legs for legs, _ in pair.near_end.events.failures] == [(1,)]
    assert pair.near.stats().retries == 2
    pair.to_near.passes = lambda message: True
    send_range(pair, 2, 2)
    pair.near_end.events.wait_sent(2)
    assert pair.near_end.events.send_error(2) is None


def test_an_ended_control_stream_fails_the_legs(connect: Connect) -> None:
    pair = connect(Endpoint("p"), Endpoint("d"))
    pair.to_far.end()
    send_range(pair, 1, 1)
    pair.near_end.events.wait_sent(1)
    assert "control stream has ended" in (pair.near_end.events.send_error(1) or "")


# ---------------------------------------------------------------- bounded links


def test_idle_links_are_evicted_when_another_is_needed(connect: Connect) -> None:
    source = Endpoint("p", TorchBlocks(seed=1), max_links=1)
    pairs = [connect(source, Endpoint(f"d{i}")) for i in range(3)]
    leg = 0
    for _ in range(2):
        for pair in pairs:
            leg += 1
            send_range(pair, leg, 3)
            source.events.wait_sent(leg)
            assert source.events.send_error(leg) is None
            assert source.budget.num_open == 1
    closed = [sum(m.HasField("closed") for m in pair.to_far.seen) for pair in pairs]
    assert closed == [2, 2, 1]
    assert [pair.near.num_open_links for pair in pairs] == [0, 0, 1]


def test_a_link_that_is_never_idle_gives_way_after_its_turn(connect: Connect) -> None:
    source = Endpoint("p", TorchBlocks(seed=1), max_links=1)
    busy, other = connect(source, Endpoint("d0")), connect(source, Endpoint("d1"))
    busy.far.expect(1, 0, busy.far_end.slots(range(64)))
    busy.near.open_sends(1)
    for _ in range(4):
        busy.near.send(source.piece(1, [0]))
    # Each piece that arrives is followed by another, so that the link never runs dry.
    busy.to_near.passes = lambda message: (busy.near.send(source.piece(1, [0])), True)[1]
    send_range(other, 2, 3)
    source.events.wait_sent(2)
    assert source.events.send_error(2) is None
    assert [leg for leg, _ in source.events.sends] == [2], "the busy leg is still at work"
    busy.to_near.passes = lambda message: True
    busy.near.finish_sends(1)
    source.events.wait_sent(1)
    assert source.events.send_error(1) is None


# ---------------------------------------------------------------- close


def close_idle(pair: Pair) -> None:
    send_range(pair, 1, 2, finish=False)
    pair.far_end.events.wait_landed(2)


def close_before_open(pair: Pair) -> None:
    pair.near.open_sends(1)
    pair.far.expect(1, 0, pair.far_end.slots(range(2)))


def close_awaiting_answer(pair: Pair) -> None:
    opened = threading.Event()
    pair.to_far.passes = lambda message: opened.set() or False  # type: ignore[func-returns-value]
    send_range(pair, 1, 2)
    assert opened.wait(20)


def close_mid_send(pair: Pair) -> None:
    stuck = threading.Event()

    def lose_announcements(message: worker_pb2.LinkMessage) -> bool:
        if message.HasField("announce"):
            stuck.set()
        return not message.HasField("announce")

    pair.to_far.passes = lose_announcements
    send_range(pair, 1, 2)
    assert stuck.wait(20)


def close_mid_receive(pair: Pair) -> None:
    """The receiver waits for a piece that never comes."""
    close_idle(pair)
    announce = worker_pb2.LinkAnnounce(sequence_number=3, leg_id=1, num_layers=4, num_tokens=1)
    pair.far.handle(worker_pb2.LinkMessage(epoch=1, announce=announce))


def close_waiting_for_the_budget(pair: Pair) -> None:
    budget = pair.near_end.budget
    for _ in range(budget.max_links):
        assert budget.acquire(_Stubborn(), lambda: True)
    send_range(pair, 1, 2)


class _Stubborn:
    def give_way(self) -> None:
        """Stays."""


@pytest.mark.parametrize(
    "window",
    [
        close_before_open,
        close_awaiting_answer,
        close_mid_send,
        close_mid_receive,
        close_idle,
        close_waiting_for_the_budget,
    ],
)
def test_close_in_every_window_closes_each_leg_once_and_ends_the_threads(
    connect: Connect, window: Callable[[Pair], None]
) -> None:
    pair = connect(Endpoint("p", max_links=1), Endpoint("d"))
    window(pair)
    pair.near.close()
    pair.far.close()
    assert "closed" in (pair.near_end.events.send_error(1) or "")
    assert pair.far_end.events.receives == [1]
    pair.close()
    pair.near.cancel_sends(1)
    pair.far.cancel_receives(1)
    assert len(pair.near_end.events.sends) == len(pair.far_end.events.receives) == 1


def test_close_during_a_scatter_closes_the_leg_after_it(connect: Connect) -> None:
    pair = connect(Endpoint("p"), Endpoint("d"))
    hold = Hold(pair.far_end.blocks)
    send_range(pair, 1, 2)
    hold.entered()
    pair.far.close()
    assert pair.far_end.events.receives == []
    hold.release()
    pair.far_end.events.wait_for(lambda: pair.far_end.events.receives == [1])


def test_legs_of_a_closed_peer_close_at_once(connect: Connect) -> None:
    pair = connect(Endpoint("p"), Endpoint("d"))
    pair.near.close()
    pair.near.open_sends(5)
    pair.near.expect(6, 0, pair.near_end.slots([0]))
    assert pair.near_end.events.send_error(5) is not None
    assert pair.near_end.events.receives == [6]
