"""Puts the HTTP edge together."""

from __future__ import annotations

from fastapi import FastAPI

import tandem
from tandem.core.config import GatewayConfig
from tandem.gateway.http import chat, completions, models, operations, texts
from tandem.gateway.http.context import Edge
from tandem.gateway.http.errors import install_error_handlers
from tandem.gateway.http.middleware import RequestMiddleware
from tandem.gateway.interfaces import MetricsTargets
from tandem.gateway.metrics import GatewayMetrics
from tandem.gateway.service import InferenceService


def create_app(
    service: InferenceService,
    config: GatewayConfig,
    metrics: GatewayMetrics,
    targets: MetricsTargets | None = None,
) -> FastAPI:
    """Return the app. Who runs it starts and closes the service."""
    app = FastAPI(
        title="Tandem", version=tandem.__version__, openapi_url=None, redirect_slashes=False
    )
    app.state.edge = Edge(service, config, metrics, targets)
    for room in (chat, completions, models, texts, operations):
        app.include_router(room.router)
    app.add_middleware(RequestMiddleware, metrics=metrics)
    install_error_handlers(app)
    return app
