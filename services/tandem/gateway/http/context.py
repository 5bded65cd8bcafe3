"""What handlers share: the parts of the gateway that they call, and what is known of a request."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Literal

from fastapi import Depends, Request
from starlette.types import Send

from tandem.core.config import GatewayConfig
from tandem.gateway.choices import Choice
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
    authorization: str = ""
    """The header `authorization`."""
    claimed_tenant: str = ""
    """On whose account, as the client or a proxy in front of us says: header `x-tenant`."""
    cache: Literal["hit", "miss"] | None = None
    """Whether the answer came from the response cache, where there is one; known with its first
    event, and said in the header `x-tandem-cache`."""
    arrival: float = field(default_factory=time.monotonic)
    outcome: Outcome | None = None
    """Set where the HTTP status does not tell how it went: streams and clients that left."""


def request_info(request: Request) -> RequestInfo:
    """Return what the middleware noted about a request."""
    info: RequestInfo = request.state.info
    return info


def noting_cache(
    service: InferenceService, choices: AsyncGenerator[Choice, None], info: RequestInfo
) -> AsyncGenerator[Choice, None]:
    """Note in `info` whether all choices that have begun came from the response cache."""
    return _noting_cache(choices, info) if service.has_cache else choices


async def _noting_cache(
    choices: AsyncGenerator[Choice, None], info: RequestInfo
) -> AsyncGenerator[Choice, None]:
    async with aclosing(choices):
        async for choice in choices:
            if choice.event.cache is not None and info.cache != "miss":
                info.cache = choice.event.cache
            yield choice


async def _edge(request: Request) -> Edge:
    edge: Edge = request.app.state.edge
    return edge


CurrentEdge = Annotated[Edge, Depends(_edge)]
