"""The staging ring: bounded, in order, and no two sends in the same bytes."""

from __future__ import annotations

import random
from collections import deque
from itertools import pairwise

import pytest
from transfer_endpoint import TorchBlocks

from tandem.transfer.staging import MAX_SENDS, Region, StagingRing


@pytest.mark.parametrize("seed", range(20))
def test_regions_never_overlap_and_the_oldest_goes_first(seed: int) -> None:
    rng = random.Random(seed)
    ring = StagingRing(TorchBlocks(), "gloo")
    taken: deque[Region] = deque()
    for _ in range(2000):
        nbytes = ring.nbytes(rng.randint(1, 4), rng.randint(1, 200))
        if rng.random() < 0.6 and ring.has_room(nbytes):
            region = ring.take(nbytes)
            while rng.random() < 0.5 and ring.has_room_behind(region, nbytes):
                region.end += nbytes
            taken.append(region)
        elif taken:
            taken.popleft()
            ring.give_back()
        held = sorted((region.start, region.end) for region in taken)
        assert all(end <= start for (_, end), (start, _) in pairwise(held))
        assert all(ring.wire(region).numel() == region.end - region.start for region in taken)
        assert len(taken) <= MAX_SENDS


def test_an_empty_ring_has_room_for_anything() -> None:
    ring = StagingRing(TorchBlocks(), "gloo")
    assert ring.has_room(1 << 20)
    region = ring.take(1 << 20)
    assert ring.wire(region).numel() == 1 << 20
    assert ring.has_room(1 << 20), "one is copied while the other is on the wire"


def test_what_is_discarded_is_not_written_over() -> None:
    ring = StagingRing(TorchBlocks(), "gloo")
    old = ring.wire(ring.take(256)).fill_(7)
    ring.discard()
    ring.wire(ring.take(256)).fill_(9)
    assert set(old.tolist()) == {7}, "the aborted group may still use it"
