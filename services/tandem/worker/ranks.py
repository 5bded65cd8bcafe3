"""The other ranks of a worker, as rank 0 sees them: told what to run, watched, and lost together.

Invariant: a rank that ends, fails or falls silent ends this process, and with it every other rank;
whoever started the worker starts it again as a whole.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import structlog
import torch
from torch import Tensor

from tandem.core.config import WorkerConfig
from tandem.core.errors import ModelLoadError, UnavailableError
from tandem.engine.parallel.group import RankGroup, open_ranks, serve_store
from tandem.engine.parallel.shard import Shard
from tandem.transfer import RankedTransfer
from tandem.transfer.receive_ledger import PieceRange
from tandem.v1 import ranks_pb2, worker_pb2
from tandem.worker.channel import Channel, ChannelClosedError
from tandem_kernels import RaggedBatch

log = structlog.get_logger(__name__)

JOIN_SECONDS = 300.0
"""How long rank 0 waits for the others' processes, and they for it."""


class RankAddress(NamedTuple):
    """Where rank 0 waits for the others, and the secret that lets them in."""

    host: str
    port: int
    token: bytes


def end_process(reason: str) -> None:
    """The worker cannot go on: end, at once, with every thread."""
    log.error("worker ends", reason=reason)
    os._exit(1)


class WorkerRanks:
    """Ranks 1 and up. `join`, `await_loaded`, then commands from the engine thread, then `stop`."""

    def __init__(
        self,
        name: str,
        size: int,
        config: WorkerConfig,
        on_lost: Callable[[str], None] = end_process,
    ) -> None:
        self.size = size
        self.ranks: RankGroup
        self.iteration = 0
        self._name = name
        self._config = config
        self._on_lost = on_lost
        family = socket.getaddrinfo(config.host, 0, type=socket.SOCK_STREAM)[0][0]
        self._listener = socket.create_server((config.host, 0), family=family)
        port = self._listener.getsockname()[1]
        self.address = RankAddress(config.host, port, secrets.token_bytes(32))
        self._channels: dict[int, Channel] = {}
        self._stopping = False
        # Guarded by `_changed`.
        self._changed = threading.Condition()
        self._loaded: set[int] = set()
        self._failure = ""
        self._transfers: dict[int, RankedTransfer] = {}
        self._last_peer = 0

    # ------------------------------------------------------------ coming together

    def join(self, device: str) -> None:
        """Wait for every rank's process and make their group. Raises `UnavailableError`."""
        deadline = time.monotonic() + JOIN_SECONDS
        while len(self._channels) < self.size - 1:
            self._listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                self._admit(Channel(self._listener.accept()[0]))
            except TimeoutError as error:
                missing = sorted(set(range(1, self.size)) - self._channels.keys())
                raise UnavailableError(f"{self._name}: ranks {missing} did not start") from error
        self._listener.close()
        store = serve_store(self._config.host, JOIN_SECONDS)
        welcome = ranks_pb2.RankWelcome(store_host=self._config.host, store_port=store.port)
        self._command(ranks_pb2.RankCommand(welcome=welcome))
        for rank, channel in self._channels.items():
            threading.Thread(
                target=self._hear, args=(rank, channel), name=f"rank-{rank}", daemon=True
            ).start()
        timeout, place = self._config.progress_timeout, torch.device(device)
        shard = Shard(0, self.size)
        self.ranks = open_ranks(store, shard, place, self._config.host, timeout)

    def await_loaded(self) -> None:
        """Wait until every rank holds its part of the model. Raises `ModelLoadError`."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or len(self._loaded) == self.size - 1)
            if self._failure:
                raise ModelLoadError(self._failure)

    def stop(self) -> None:
        """Let every rank end in good order."""
        self._stopping = True
        self._listener.close()
        for channel in self._channels.values():
            try:
                channel.send(ranks_pb2.RankCommand(stop=ranks_pb2.StopStep()))
            except ChannelClosedError as error:
                log.info("rank is gone already", worker=self._name, reason=str(error))

    def _admit(self, channel: Channel) -> None:
        try:
            report = ranks_pb2.RankReport.FromString(channel.receive(self._config.peer_timeout))
        except ChannelClosedError:
            channel.close()
            return
        hello = report.hello
        known = secrets.compare_digest(hello.token, self.address.token)
        if not known or not 0 < hello.rank < self.size or hello.rank in self._channels:
            log.warning("stranger refused", worker=self._name, rank=hello.rank)
            channel.close()
            return
        self._channels[hello.rank] = channel
        log.info("rank joined", worker=self._name, rank=hello.rank, pid=hello.pid)

    # ------------------------------------------------------------ `Announcer` and `OtherRanks`

    def forward(self, token_ids: Tensor, batch: RaggedBatch, wanted_rows: Tensor | None) -> None:
        """Announce a forward pass. Engine thread."""
        self.iteration += 1
        lengths = np.diff(np.array(batch.query_starts, dtype=np.int64))
        starts = np.array(batch.context_lens, dtype=np.int64) - lengths
        step = ranks_pb2.ForwardStep(
            iteration=self.iteration,
            token_ids=_bytes(token_ids),
            starts=starts.tobytes(),
            lengths=lengths.tobytes(),
            block_tables=_bytes(batch.block_tables),
            wanted_rows=None if wanted_rows is None else _bytes(wanted_rows),
        )
        self._command(ranks_pb2.RankCommand(forward=step))

    def logits(self, first_row: int, num_rows: int) -> None:
        """Announce that logits are wanted. Engine thread."""
        step = ranks_pb2.LogitsStep(first_row=first_row, num_rows=num_rows)
        self._command(ranks_pb2.RankCommand(logits=step))

    def lost(self, error: Exception) -> None:
        """Rank 0 failed in the middle of what it announced: the ranks are out of step for good."""
        self._on_lost(f"{self._name}: rank 0 failed: {error}")

    def enter(self, transfer: RankedTransfer) -> int:
        """Number a peer."""
        with self._changed:
            self._last_peer += 1
            self._transfers[self._last_peer] = transfer
            return self._last_peer

    def leave(self, peer: int) -> None:
        """Forget a peer."""
        with self._changed:
            self._transfers.pop(peer, None)

    def tell(self, step: ranks_pb2.TransferStep) -> None:
        """Let every rank do this with its own heads."""
        self._command(ranks_pb2.RankCommand(transfer=step))

    def relay(self, peer: int, message: worker_pb2.LinkMessage) -> None:
        """Pass a peer's message on."""
        step = ranks_pb2.TransferStep(peer=peer, link=message)
        if message.to_rank in self._channels:
            self._send(message.to_rank, ranks_pb2.RankCommand(transfer=step))

    def _command(self, command: ranks_pb2.RankCommand) -> None:
        for rank in self._channels:
            self._send(rank, command)

    def _send(self, rank: int, command: ranks_pb2.RankCommand) -> None:
        try:
            self._channels[rank].send(command)
        except ChannelClosedError as error:
            self._lose(rank, str(error))

    # ------------------------------------------------------------ hearing, a thread per rank

    def _hear(self, rank: int, channel: Channel) -> None:
        config = self._config
        try:
            while True:
                # A rank that loads may hold its threads up for longer than one that serves.
                limit = config.peer_timeout
                if rank not in self._loaded:
                    limit = max(limit, config.progress_timeout)
                self._take(rank, ranks_pb2.RankReport.FromString(channel.receive(limit)))
        except ChannelClosedError as error:
            self._lose(rank, str(error))
        except Exception as error:
            log.exception("report failed", worker=self._name, rank=rank)
            self._lose(rank, str(error))

    def _take(self, rank: int, report: ranks_pb2.RankReport) -> None:
        match report.WhichOneof("kind"):
            case "beat":
                pass  # that it came is all it says
            case "loaded":
                with self._changed:
                    self._loaded.add(rank)
                    self._changed.notify_all()
            case "failed":
                self._failed(rank, report.failed.reason)
            case kind if kind is not None:
                self._of_transfer(getattr(report, kind), kind)

    def _of_transfer(self, body: Any, kind: str) -> None:
        with self._changed:
            transfer = self._transfers.get(body.peer)
        if transfer is None:
            return
        match kind:
            case "link":
                transfer.send_control(body.message)
            case "landed":
                piece = PieceRange(
                    body.leg_id, body.first_layer, body.num_layers, body.start, body.num_tokens
                )
                transfer.slice_landed(piece, body.seconds, body.num_bytes)
            case "sends_closed":
                error = body.error if body.HasField("error") else None
                transfer.link_sends_closed(body.leg_id, error)
            case "receives_closed":
                transfer.link_receives_closed(body.leg_id)
            case "link_failed":
                transfer.link_failed(list(body.leg_ids), body.reason)

    def _failed(self, rank: int, reason: str) -> None:
        """A rank says why it ends. While it loads, that is why the worker does not start."""
        with self._changed:
            self._failure = f"rank {rank}: {reason}"
            loading = len(self._loaded) < self.size - 1
            self._changed.notify_all()
        if not loading:
            self._lose(rank, reason)

    def _lose(self, rank: int, reason: str) -> None:
        if not self._stopping and not self._failure:
            self._on_lost(f"{self._name}: rank {rank} is lost: {reason}")


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()
