"""Where the workers expose their metrics, asked of the controller when Prometheus asks us."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
import grpc.aio

from tandem.core.errors import UnavailableError
from tandem.gateway.interfaces import MetricsTarget
from tandem.v1 import cluster_pb2, cluster_pb2_grpc

_TIMEOUT_SECONDS = 2.0
_ROLES: dict[int, str] = {cluster_pb2.ROLE_PREFILL: "prefill", cluster_pb2.ROLE_DECODE: "decode"}


class ClusterMetricsTargets:
    """Implements `MetricsTargets` over `Cluster.Status`."""

    def __init__(self, controller_address: str, gateways: Sequence[MetricsTarget] = ()) -> None:
        """`gateways` are those that share this one's ports, if there are several."""
        self._address = controller_address
        self._gateways = tuple(gateways)

    async def __call__(self) -> list[MetricsTarget]:
        """Return every worker that says where its metrics are, and the gateways.

        Raises `UnavailableError` when the controller does not answer: Prometheus then keeps the
        targets that it knows.
        """
        async with grpc.aio.insecure_channel(self._address) as channel:
            stub: cluster_pb2_grpc.ClusterAsyncStub = cluster_pb2_grpc.ClusterStub(channel)
            try:
                status = await stub.Status(cluster_pb2.StatusRequest(), timeout=_TIMEOUT_SECONDS)
            except grpc.aio.AioRpcError as error:
                raise UnavailableError(
                    f"the controller at {self._address} does not answer: {error.details()}"
                ) from error
        workers = [
            MetricsTarget(worker.metrics_address, worker.name, _ROLES.get(worker.role, "unknown"))
            for worker in status.workers
            if worker.metrics_address
        ]
        return [*workers, *self._gateways]
