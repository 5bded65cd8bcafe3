"""A worker program with no model: it answers the controller over real gRPC, in a real process.

Imported by Ray's workers through PYTHONPATH. Its `served_name` tells it how to misbehave.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import grpc.aio

from tandem.core.config import TandemConfig
from tandem.core.errors import ModelLoadError
from tandem.v1 import cluster_pb2, worker_pb2, worker_pb2_grpc

BROKEN_MODEL = "broken"


class StandInEndpoint(NamedTuple):
    address: str
    metrics_address: str
    incarnation: int
    pid: int


class StandInWorker(worker_pb2_grpc.WorkerServicer):
    def __init__(
        self, name: str, config: TandemConfig, device: str, progress: Callable[[str, float], None]
    ) -> None:
        self.name = name
        self.config = config
        self.device = device
        self.progress = progress
        self.incarnation = time.time_ns()
        self.loop = asyncio.new_event_loop()

    def start(self) -> StandInEndpoint:
        if self.config.model.served_name == BROKEN_MODEL:
            raise ModelLoadError("architecture 'Nonesuch' is not supported")
        self.progress("loading weights", 0.5)
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        port = asyncio.run_coroutine_threadsafe(self._serve(), self.loop).result()
        return StandInEndpoint(f"127.0.0.1:{port}", "", self.incarnation, os.getpid())

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.server.stop(0), self.loop).result(5)
        self.loop.call_soon_threadsafe(self.loop.stop)

    async def _serve(self) -> int:
        self.server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        return port

    async def Status(  # noqa: N802
        self, request: worker_pb2.WorkerStatusRequest, context: object
    ) -> cluster_pb2.WorkerStatus:
        return cluster_pb2.WorkerStatus(
            name=self.name,
            pid=os.getpid(),
            incarnation=self.incarnation,
            device=self.device,
            blocks_total=64,
            model_info=cluster_pb2.ModelInfo(name="stand-in", block_size=16, vocab_size=512),
        )

    async def Adopt(  # noqa: N802
        self, request: worker_pb2.AdoptRequest, context: object
    ) -> worker_pb2.AdoptResponse:
        self.incarnation = request.incarnation
        return worker_pb2.AdoptResponse(incarnation=self.incarnation)
