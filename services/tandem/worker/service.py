"""The controller's door to a worker: status, a new incarnation, the state of its blocks."""

from __future__ import annotations

from typing import Protocol

from tandem.core.errors import IntegrityError
from tandem.v1 import cluster_pb2, worker_pb2, worker_pb2_grpc
from tandem.worker.engine_loop import EngineLoop


class ServedWorker(Protocol):
    """What the controller may ask of a worker."""

    incarnation: int

    def status(self) -> cluster_pb2.WorkerStatus:
        """Describe it. Any thread."""

    def adopt(self, incarnation: int) -> None:
        """Take a new incarnation. Engine thread."""

    def check_integrity(self) -> None:
        """Raise `IntegrityError` if its block pools contradict themselves. Engine thread."""


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """The controller's door."""

    def __init__(self, worker: ServedWorker, loop: EngineLoop) -> None:
        self._worker = worker
        self._loop = loop

    async def Status(  # noqa: N802 - named by the proto
        self, request: worker_pb2.WorkerStatusRequest, context: object
    ) -> cluster_pb2.WorkerStatus:
        return self._worker.status()

    async def Adopt(  # noqa: N802
        self, request: worker_pb2.AdoptRequest, context: object
    ) -> worker_pb2.AdoptResponse:
        await self._loop.call(self._worker.adopt, request.incarnation)
        return worker_pb2.AdoptResponse(incarnation=self._worker.incarnation)

    async def CheckIntegrity(  # noqa: N802
        self, request: worker_pb2.CheckIntegrityRequest, context: object
    ) -> worker_pb2.CheckIntegrityResponse:
        try:
            await self._loop.call(self._worker.check_integrity)
        except IntegrityError as error:
            return worker_pb2.CheckIntegrityResponse(violations=error.message.splitlines())
        return worker_pb2.CheckIntegrityResponse()
