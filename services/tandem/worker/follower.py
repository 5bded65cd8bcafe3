"""A rank other than 0 of a worker: runs what rank 0 announces and moves the KV of its own heads.

No scheduler, no block pool, no server. Commands about KV are carried out in the thread that reads
them, beside the forward pass; forward passes in the main thread, in the order in which they came.
Ends, whatever it is doing, when rank 0 is gone.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import structlog
import torch

from tandem.core.config import TandemConfig
from tandem.core.errors import TandemError
from tandem.engine.load import load_model
from tandem.engine.parallel.follower import Follower, Numbers
from tandem.engine.parallel.group import join_store, open_ranks
from tandem.engine.parallel.shard import Shard
from tandem.engine.spec import load_spec
from tandem.modelfiles import resolve_model
from tandem.scheduler import PoolRole
from tandem.v1 import ranks_pb2
from tandem.worker.channel import Channel, ChannelClosedError
from tandem.worker.follower_links import FollowerLinks
from tandem.worker.garbage import spare_what_is_here
from tandem.worker.ranks import JOIN_SECONDS, RankAddress, end_process
from tandem.worker.shares import default_threads, neighbours_of
from tandem.worker.written import WrittenLayers

log = structlog.get_logger(__name__)

Progress = Callable[[str, float], None]


class FollowerRank:
    """One rank. `run` returns when rank 0 has stopped the worker in good order."""

    def __init__(
        self,
        name: str,
        role: PoolRole,
        config: TandemConfig,
        device: str,
        rank: int,
        address: RankAddress,
        on_orphaned: Callable[[str], None] = end_process,
    ) -> None:
        """`on_orphaned`: called in whatever thread hears that rank 0 is gone."""
        self._name = f"{name}/{rank}"
        self._config = config
        self._device = device
        self._shard = Shard(rank, config.tensor_parallel(role))
        self._address = address
        self._on_orphaned = on_orphaned
        self._steps: queue.SimpleQueue[ranks_pb2.RankCommand | None] = queue.SimpleQueue()
        self._written = WrittenLayers()

    def run(self) -> None:
        """Join rank 0, load, and follow until told to stop. Raises what ends it otherwise, after
        rank 0 has been told."""
        channel = self._connect()
        threading.Thread(
            target=self._beat, args=(channel,), name=f"{self._name}-beat", daemon=True
        ).start()
        try:
            self._serve(channel)
        except Exception as error:
            reason = error.message if isinstance(error, TandemError) else f"{error!r}"
            log.error("rank ends", rank=self._name, reason=reason)
            channel.send(ranks_pb2.RankReport(failed=ranks_pb2.RankFailed(reason=reason)))
            raise
        finally:
            channel.close()

    # -- joining

    def _connect(self) -> Channel:
        deadline = time.monotonic() + JOIN_SECONDS
        connection = socket.create_connection(self._address[:2], timeout=JOIN_SECONDS)
        channel = Channel(connection)
        hello = ranks_pb2.RankHello(
            token=self._address.token, rank=self._shard.rank, pid=os.getpid()
        )
        channel.send(ranks_pb2.RankReport(hello=hello))
        self._store = self._meet(channel, deadline - time.monotonic())
        return channel

    def _meet(self, channel: Channel, timeout: float) -> Any:
        command = ranks_pb2.RankCommand.FromString(channel.receive(timeout))
        welcome = command.welcome
        return join_store(welcome.store_host, welcome.store_port, JOIN_SECONDS)

    def _beat(self, channel: Channel) -> None:
        """Say at every heartbeat interval that this process is not frozen."""
        beat = ranks_pb2.RankReport(beat=ranks_pb2.RankBeat())
        try:
            while True:
                channel.send(beat)
                time.sleep(self._config.worker.heartbeat_interval)
        except ChannelClosedError:
            return  # whoever reads the channel hears of it, too

    # -- following

    def _serve(self, channel: Channel) -> None:
        config, place = self._config, torch.device(self._device)
        torch.set_num_threads(config.worker.threads or default_threads(config))
        host, timeout = config.worker.host, config.worker.progress_timeout
        ranks = open_ranks(self._store, self._shard, place, host, timeout)
        model_dir = resolve_model(config.model.path)
        spec = load_spec(model_dir, config.model, self._device)
        neighbours = neighbours_of(config, self._device)
        loaded = load_model(
            *(model_dir, config.model, config.cache, spec, place),
            neighbours=neighbours,
            ranks=ranks,
        )
        follower = Follower(loaded.decoder, loaded.storage)
        links = FollowerLinks(self._shard.rank, follower.storage, config, channel, self._written)
        threading.Thread(
            target=self._read, args=(channel, links), name=f"{self._name}-read", daemon=True
        ).start()
        spare_what_is_here()
        channel.send(ranks_pb2.RankReport(loaded=ranks_pb2.RankLoaded()))
        log.info("rank ready", rank=self._name, device=self._device, pid=os.getpid())
        while (command := self._steps.get()) is not None:
            if command.WhichOneof("kind") == "forward":
                self._forward(follower, command.forward)
            else:
                follower.logits(command.logits.first_row, command.logits.num_rows)

    def _read(self, channel: Channel, links: FollowerLinks) -> None:
        """Sort commands until the connection ends. Rank 0 may be frozen for as long as it likes."""
        try:
            while True:
                command = ranks_pb2.RankCommand.FromString(channel.receive(None))
                match command.WhichOneof("kind"):
                    case "transfer":
                        links.take(command.transfer)
                    case "stop":
                        self._steps.put(None)
                        return
                    case _:
                        self._steps.put(command)
        except ChannelClosedError as error:
            self._on_orphaned(f"{self._name}: rank 0 is gone: {error}")
        except Exception as error:
            log.exception("command failed", rank=self._name)
            self._on_orphaned(f"{self._name}: {error}")

    def _forward(self, follower: Follower, step: ranks_pb2.ForwardStep) -> None:
        device = follower.storage.device

        def on_written(layer: int) -> None:
            ready = None
            if device.type == "cuda":
                ready = torch.cuda.current_stream(device).record_event()
            self._written.note(step.iteration, layer, ready)

        starts = _numbers(step.starts)
        wanted = _numbers(step.wanted_rows) if step.HasField("wanted_rows") else None
        follower.forward(
            _numbers(step.token_ids),
            starts,
            _numbers(step.lengths),
            _numbers(step.block_tables).reshape(len(starts), -1),
            wanted,
            on_written,
        )


def _numbers(data: bytes) -> Numbers:
    return np.frombuffer(data, dtype=np.int64).copy()
