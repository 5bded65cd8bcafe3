"""`grpc.health.v1.Health`: SERVING when a request would be served, as `/ready` says it."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from tandem.gateway.grpc.calls import Context
from tandem.gateway.service import InferenceService

SERVICE_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_Status = health_pb2.HealthCheckResponse


class HealthServicer:
    """Knows the whole server ("") and each of its services by name."""

    def __init__(self, service: InferenceService, names: frozenset[str]) -> None:
        self._service = service
        self._names = names | {""}
        self._stopping = False

    def stop(self) -> None:
        """From now on: NOT_SERVING. Ends the watches, which would hold up the server's end."""
        self._stopping = True
        self._service.changes.notify()

    async def Check(  # noqa: N802  named by the contract
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """Return the status now."""
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {request.service!r}")
        return _Status(status=self._status(request.service))

    async def List(  # noqa: N802
        self, request: health_pb2.HealthListRequest, context: Context
    ) -> health_pb2.HealthListResponse:
        """Return the status of every service now."""
        statuses = {name: _Status(status=self._status(name)) for name in self._names}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """Send the status now and after every change."""
        sent = None
        while True:
            status = self._status(request.service)
            if status != sent:
                yield _Status(status=status)
                sent = status
            if self._stopping:
                return
            await self._service.changes.wait()

    def _status(self, name: str) -> health_pb2.HealthCheckResponse.ServingStatus.ValueType:
        if name not in self._names:
            return _Status.SERVICE_UNKNOWN
        serving = self._service.ready and not self._stopping
        return _Status.SERVING if serving else _Status.NOT_SERVING
