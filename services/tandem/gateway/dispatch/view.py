"""Who is in the cluster, as the controller publishes it.

Watches for ever. Invariant: when the controller is away, the last known members stay in force;
nothing here depends on it being there.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tandem.gateway.dispatch.connection import Reconnection, open_channel
from tandem.gateway.interfaces import ModelInfo
from tandem.v1 import cluster_pb2, cluster_pb2_grpc

REFRESH_SECONDS = 30.0
"""A watch that was quiet for this long is opened anew: the peer may be gone without a trace."""


@dataclass(frozen=True, slots=True)
class Member:
    """One worker that takes requests. `name` outlives restarts; `incarnation` does not."""

    name: str
    address: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Membership:
    """Everything that one message of the controller says."""

    prefill: Mapping[str, Member] = field(default_factory=dict)
    """Empty when the cluster is not disaggregated."""
    decode: Mapping[str, Member] = field(default_factory=dict)
    model: ModelInfo | None = None


def membership_from_proto(message: cluster_pb2.Membership) -> Membership:
    """Return the members by role and name."""
    roles: dict[int, dict[str, Member]] = {
        cluster_pb2.ROLE_PREFILL: {},
        cluster_pb2.ROLE_DECODE: {},
    }
    for member in message.members:
        if member.role in roles:
            known = Member(member.name, member.address, member.incarnation)
            roles[member.role][member.name] = known
    model = None
    if message.HasField("model"):
        model = ModelInfo(
            name=message.model.name,
            path=message.model.path,
            max_model_len=message.model.max_model_len,
            block_size=message.model.block_size,
            vocab_size=message.model.vocab_size,
            prefix_cache=not message.model.no_prefix_cache,
        )
    prefill = roles[cluster_pb2.ROLE_PREFILL] if message.disaggregated else {}
    return Membership(prefill, roles[cluster_pb2.ROLE_DECODE], model)


class ClusterView:
    """Follows `Cluster.Watch` and hands every change to `on_change`."""

    def __init__(
        self,
        address: str,
        gateway_id: str,
        on_change: Callable[[Membership], None],
        rng: random.Random,
    ) -> None:
        self._address = address
        self._gateway_id = gateway_id
        self._on_change = on_change
        self._connection = Reconnection(rng, "cluster watch", controller=address)
        self._tracing_port = 0

    async def run(self, tracing_port: int = 0) -> None:
        """Watch until cancelled. The controller learns where this gateway serves `Tracing`."""
        self._tracing_port = tracing_port
        await self._connection.keep(self._watch)

    async def _watch(self) -> str:
        """Hand on members until the watch ends; return why, if not because it was quiet."""
        async with open_channel(self._address) as channel:
            stub = cluster_pb2_grpc.ClusterStub(channel)
            call = stub.Watch(
                cluster_pb2.WatchRequest(
                    gateway_id=self._gateway_id, tracing_port=self._tracing_port
                )
            )
            version = -1
            while True:
                try:
                    message = await asyncio.wait_for(call.read(), REFRESH_SECONDS)
                except TimeoutError:
                    return ""
                if not isinstance(message, cluster_pb2.Membership):
                    return "the controller ended the watch"
                if message.version >= version:  # a restarted controller counts anew, a stream never
                    version = message.version
                    self._connection.up(version=version)
                    self._on_change(membership_from_proto(message))
