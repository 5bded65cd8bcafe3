"""One end of KV links for the tests: blocks, a record of events, and the peers it talks to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tandem.core.config import TransferConfig
from tandem.transfer import KVBlocks, LinkBudget, PeerTransfer, Piece, Rendezvous, make_kv_spec
from tandem.v1 import worker_pb2

WAIT_SECONDS = 20.0
"""Backstop of every wait in these tests; none is expected to come near it."""


class TorchBlocks:
    """Paged KV in plain torch: what `KVBlocks` asks for and nothing else."""

    def __init__(
        self,
        num_layers: int = 4,
        num_blocks: int = 16,
        block_size: int = 4,
        dtype: torch.dtype = torch.float32,
        seed: int | None = None,
        device: str = "cpu",
    ) -> None:
        shape = (num_layers, 2, num_blocks, block_size, 2, 8)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        if seed is not None:
            values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            self.kv.copy_(values)
        self.before_unpack: Callable[[], None] = lambda: None
        """A test's hook into a scatter that is about to start."""

    def flat(self, first_layer: int, num_layers: int) -> torch.Tensor:
        """[num_layers, 2, num_slots, heads, dim]"""
        return self.kv[first_layer : first_layer + num_layers].flatten(2, 3)

    def pack(
        self,
        first_layer: int,
        num_layers: int,
        slots: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return torch.index_select(self.flat(first_layer, num_layers), 2, slots, out=out)

    def unpack(
        self, first_layer: int, num_layers: int, slots: torch.Tensor, staging: torch.Tensor
    ) -> None:
        self.before_unpack()
        self.flat(first_layer, num_layers)[:, :, slots] = staging


class EventLog:
    """Records events; `wait_for` blocks until they satisfy a predicate."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.landed: list[tuple[int, int, int, int, int]] = []
        self.landed_bytes = 0
        self.sends: list[tuple[int, str | None]] = []
        self.receives: list[int] = []
        self.failures: list[tuple[tuple[int, ...], str]] = []

    def piece_landed(
        self,
        leg_id: int,
        first_layer: int,
        num_layers: int,
        start: int,
        num_tokens: int,
        seconds: float,
        nbytes: int,
    ) -> None:
        with self._changed:
            assert seconds >= 0
            self.landed.append((leg_id, first_layer, num_layers, start, num_tokens))
            self.landed_bytes += nbytes
            self._changed.notify_all()

    def sends_closed(self, leg_id: int, error: str | None) -> None:
        with self._changed:
            self.sends.append((leg_id, error))
            self._changed.notify_all()

    def receives_closed(self, leg_id: int) -> None:
        with self._changed:
            self.receives.append(leg_id)
            self._changed.notify_all()

    def link_failed(self, leg_ids: Sequence[int], reason: str) -> None:
        with self._changed:
            self.failures.append((tuple(leg_ids), reason))
            self._changed.notify_all()

    def wait_for(self, predicate: Callable[[], bool]) -> None:
        with self._changed:
            happened = self._changed.wait_for(predicate, WAIT_SECONDS)
        assert happened, (self.landed, self.sends, self.receives, self.failures)

    def wait_landed(self, count: int) -> None:
        self.wait_for(lambda: len(self.landed) >= count)

    def wait_sent(self, *legs: int) -> None:
        self.wait_for(lambda: {leg for leg, _ in self.sends} >= set(legs))

    def send_error(self, leg_id: int) -> str | None:
        """The error a leg closed with; fails unless it closed exactly once."""
        (error,) = [error for leg, error in self.sends if leg == leg_id]
        return error


class Endpoint:
    """A worker as far as KV is concerned; `connect` makes its side of one peer."""

    def __init__(
        self,
        name: str,
        blocks: KVBlocks | None = None,
        config: TransferConfig | None = None,
        revision: str = "r1",
        max_links: int = 32,
    ) -> None:
        self.name = name
        self.blocks: Any = blocks or TorchBlocks()
        self.config = config or TransferConfig(transfer_timeout=WAIT_SECONDS)
        self.spec = make_kv_spec("model", revision, self.blocks, self.config)
        self.budget = LinkBudget(max_links, turn_seconds=0.05)
        self.rendezvous = Rendezvous("127.0.0.1")
        self.events = EventLog()

    def connect(
        self, peer_name: str, send_control: Callable[[worker_pb2.LinkMessage], None]
    ) -> PeerTransfer:
        return PeerTransfer(
            self.blocks,
            self.spec,
            self.config,
            send_control,
            self.events,
            peer_name,
            budget=self.budget,
            rendezvous=self.rendezvous,
        )

    def slots(self, slots: Sequence[int]) -> torch.Tensor:
        return torch.tensor(slots, dtype=torch.int64, device=self.blocks.kv.device)

    def piece(
        self,
        leg_id: int,
        slots: Sequence[int],
        start: int = 0,
        first_layer: int = 0,
        num_layers: int | None = None,
    ) -> Piece:
        count = self.blocks.kv.shape[0] - first_layer if num_layers is None else num_layers
        return Piece(leg_id, 0, first_layer, count, start, self.slots(slots))
