"""Fixtures of the transfer tests. Both ranks of a group may live in one process."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file

from transfer_endpoint import Endpoint
from transfer_pair import Connect, Pair

torch.set_num_threads(1)


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Connects endpoints, and closes what it connected; no thread outlives the test."""
    before = set(threading.enumerate())
    pairs: list[Pair] = []

    def make(near: Endpoint, far: Endpoint) -> Pair:
        pairs.append(Pair(near, far))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()
    assert set(threading.enumerate()) <= before


@pytest.fixture(params=["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def devices(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Where the two ends live: gloo on the CPU, NCCL on two GPUs; the same tests for both."""
    if request.param == "gloo":
        return ("cpu", "cpu")
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL takes each GPU for one rank only, so this needs two")
    return ("cuda:0", "cuda:1")
