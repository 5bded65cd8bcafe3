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


BACKENDS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> str:
    """gloo on the CPU, NCCL on a GPU: the same tests."""
    return str(request.param)
