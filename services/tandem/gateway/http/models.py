"""`GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from tandem.gateway.http.context import CurrentEdge
from tandem.gateway.http.errors import json_response
from tandem.gateway.interfaces import ModelInfo

router = APIRouter()
_STARTED = int(time.time())


@router.get("/v1/models")
async def list_models(edge: CurrentEdge) -> Response:
    """List the served model; nothing before a worker has registered one."""
    served = edge.service.served
    data = [] if served is None else [_model(served.info)]
    return json_response({"object": "list", "data": data})


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(model_id: str, edge: CurrentEdge) -> Response:
    """Describe one model; its id may hold slashes."""
    model = await edge.service.model(model_id)
    return json_response(_model(model.info))


def _model(info: ModelInfo) -> dict[str, Any]:
    return {
        "id": info.name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "tandem",
        "max_model_len": info.max_model_len,
    }
