"""`tandem.v1.Cluster` over gRPC: membership for gateways, status for operators.

Reads the manager and changes nothing. Every watcher first gets the whole membership, then again
after each change; versions that follow each other quickly may be merged into the last one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from urllib.parse import unquote

import grpc.aio

from tandem.controller.manager import PoolManager
from tandem.controller.roster import Role, Slot, State
from tandem.core.config import TandemConfig
from tandem.modelfiles import served_name
from tandem.v1 import cluster_pb2, cluster_pb2_grpc

ROLES: dict[Role, cluster_pb2.Role.ValueType] = {
    "prefill": cluster_pb2.ROLE_PREFILL,
    "decode": cluster_pb2.ROLE_DECODE,
}
STATES: dict[State, cluster_pb2.WorkerState.ValueType] = {
    "starting": cluster_pb2.WORKER_STATE_STARTING,
    "ready": cluster_pb2.WORKER_STATE_READY,
    "unresponsive": cluster_pb2.WORKER_STATE_UNRESPONSIVE,
    "dead": cluster_pb2.WORKER_STATE_DEAD,
}


class ClusterService(cluster_pb2_grpc.ClusterServicer):
    """What gateways and `tandem status` call."""

    def __init__(self, manager: PoolManager, config: TandemConfig, dashboard: str) -> None:
        self._manager = manager
        self._model = served_name(config.model.path, config.model.served_name)
        self._disaggregated = config.worker.disaggregated
        self._dashboard = dashboard
        self._watchers: dict[object, cluster_pb2.GatewayStatus] = {}

    async def Watch(  # noqa: N802 - named by the proto
        self,
        request: cluster_pb2.WatchRequest,
        context: grpc.aio.ServicerContext[cluster_pb2.WatchRequest, cluster_pb2.Membership],
    ) -> AsyncIterator[cluster_pb2.Membership]:
        self._watchers[context] = cluster_pb2.GatewayStatus(
            gateway_id=request.gateway_id,
            tracing_address=_at_peer(context.peer(), request.tracing_port),
        )
        try:
            while True:
                membership = self._membership()
                yield membership
                await self._manager.wait_for_change(membership.version)
        finally:
            del self._watchers[context]

    async def Status(  # noqa: N802
        self, request: cluster_pb2.StatusRequest, context: object
    ) -> cluster_pb2.ClusterStatus:
        return cluster_pb2.ClusterStatus(
            membership_version=self._manager.roster.version,
            model=self._model,
            workers=[self._worker_status(slot) for slot in self._manager.roster.slots],
            dashboard=self._dashboard,
            gateways=self._gateways(),
        )

    def _gateways(self) -> list[cluster_pb2.GatewayStatus]:
        """One entry per gateway, whose watches may overlap while it opens a new one."""
        known = {status.gateway_id: status for status in self._watchers.values()}
        return [known[name] for name in sorted(known)]

    def _membership(self) -> cluster_pb2.Membership:
        return cluster_pb2.Membership(
            version=self._manager.roster.version,
            members=[
                cluster_pb2.Member(
                    name=member.name,
                    role=ROLES[member.role],
                    address=member.address,
                    incarnation=member.incarnation,
                )
                for member in self._manager.members()
            ],
            disaggregated=self._disaggregated,
            model=self._manager.model_info(),
        )

    def _worker_status(self, slot: Slot) -> cluster_pb2.WorkerStatus:
        """What the worker said last, under the state that the roster gives it."""
        status = cluster_pb2.WorkerStatus()
        last = self._manager.status_of(slot.name)
        if last is not None:
            status.CopyFrom(last)
        status.name = slot.name
        status.role = ROLES[slot.role]
        status.state = STATES[slot.state]
        status.incarnation = slot.incarnation
        status.restarts = slot.restarts
        status.detail = slot.detail
        status.model = self._model
        if slot.endpoint is not None:
            status.address = slot.endpoint.address
            status.metrics_address = slot.endpoint.metrics_address
            status.pid = slot.endpoint.pid
            status.node = slot.endpoint.node
            status.device = status.device or slot.endpoint.device  # the worker names its cores
        return status


def _at_peer(peer: str, port: int) -> str:
    """The address of a port where a call came from; empty if there is none.

    gRPC writes `ipv4:10.0.0.7:41234` and `ipv6:%5B::1%5D:41234`.
    """
    family, _, rest = unquote(peer).partition(":")
    host = rest.rpartition(":")[0]
    return f"{host}:{port}" if port and family in ("ipv4", "ipv6") else ""


async def serve_cluster(
    service: ClusterService, host: str, port: int
) -> tuple[grpc.aio.Server, str]:
    """Start the gRPC server. Returns it and its address; raises OSError if the port is taken."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    cluster_pb2_grpc.add_ClusterServicer_to_server(service, server)
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error}") from error
    await server.start()
    return server, f"{host}:{bound}"
