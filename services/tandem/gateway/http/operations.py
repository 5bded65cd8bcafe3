"""What operators and their machines ask: liveness, readiness, version, metrics."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

import tandem
from tandem.gateway.http.context import CurrentEdge
from tandem.gateway.http.errors import json_response

router = APIRouter()


@router.get("/health")
async def health() -> Response:
    """Liveness: the process answers. Never depends on workers or load."""
    return json_response({"status": "ok"})


@router.get("/ready")
async def ready(edge: CurrentEdge) -> Response:
    """Readiness: a request would be served now."""
    if edge.service.ready:
        return json_response({"status": "ready"})
    return json_response({"status": "not ready", "reason": edge.service.why_not_ready}, 503)


@router.get("/version")
async def version() -> Response:
    """The version of this gateway."""
    return json_response({"version": tandem.__version__})


@router.get("/metrics")
async def metrics(edge: CurrentEdge) -> Response:
    """This gateway's metrics, for Prometheus."""
    return Response(edge.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


@router.get("/metrics/targets")
async def metrics_targets(edge: CurrentEdge) -> Response:
    """The workers' metrics addresses, for Prometheus' HTTP service discovery."""
    targets = await edge.targets() if edge.targets is not None else []
    return json_response(
        [
            {
                "targets": [target.address],
                "labels": {"worker": target.worker, "role": target.role},
            }
            for target in targets
        ]
    )
