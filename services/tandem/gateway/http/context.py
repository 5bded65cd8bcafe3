"""What handlers share: the parts of the gateway that they call, and what is known of a request."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request
from starlette.types import Send

from tandem.core.config import GatewayConfig
from tandem.gateway.interfaces import MetricsTargets
from tandem.gateway.metrics import GatewayMetrics, Outcome
from tandem.gateway.service import InferenceService


@dataclass(frozen=True, slots=True)
class Edge:
    """Made once per app."""

    service: InferenceService
    config: GatewayConfig
    metrics: GatewayMetrics
    targets: MetricsTargets | None = None


@dataclass(slots=True)
class RequestInfo:
    """Made by the middleware for every request."""

    request_id: str
    send: Send
    """The server's own: what follows the head of an answer needs none of the layers between."""
    tenant: str = ""
    """On whose account, as the client or a proxy in front of us says: header `x-tenant`."""
    arrival: float = field(default_factory=time.monotonic)
    outcome: Outcome | None = None
    """Set where the HTTP status does not tell how it went: streams and clients that left."""


def request_info(request: Request) -> RequestInfo:
    """Return what the middleware noted about a request."""
    info: RequestInfo = request.state.info
    return info


async def _edge(request: Request) -> Edge:
    edge: Edge = request.app.state.edge
    return edge


CurrentEdge = Annotated[Edge, Depends(_edge)]
