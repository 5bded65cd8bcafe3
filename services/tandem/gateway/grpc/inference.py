"""`tandem.v1.Inference`."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc
import grpc.aio

from tandem.core.sampling import validate_token_ids
from tandem.gateway.grpc.calls import CallRunner, Context
from tandem.gateway.grpc.convert import (
    check_request_id,
    generate_response,
    prompt_of,
    sampling_options,
)
from tandem.gateway.metrics import GatewayMetrics
from tandem.gateway.service import InferenceService
from tandem.v1 import inference_pb2 as pb

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Inference"].full_name


class InferenceServicer:
    """The four calls. Errors travel to `CallRunner`, which knows their status codes."""

    def __init__(self, service: InferenceService) -> None:
        self._service = service

    async def generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Stream the tokens of one prompt."""
        arrival = time.monotonic()
        check_request_id(request.request_id)
        model = await self._service.model(request.model)
        prompt = prompt_of(request)
        is_text = isinstance(prompt, str)
        prepared = self._service.prepare(
            model,
            await self._service.encode(model, prompt) if isinstance(prompt, str) else prompt,
            sampling_options(request.sampling),
            prompt_field="text" if is_text else "token_ids",
            client_id=request.request_id,
            priority=request.priority_class or request.priority,
            cache_salt=request.cache_salt,
            tenant=self._service.tenants.of(_authorization(context), request.tenant),
            ttft_objective=request.ttft_objective,
            itl_objective=request.itl_objective,
        )
        request_id = request.request_id or secrets.token_hex(16)
        async with aclosing(self._service.generate(model, prepared, arrival)) as events:
            async for event in events:
                if event.cache is not None:
                    await context.send_initial_metadata((("x-tandem-cache", event.cache),))
                yield generate_response(request_id, event)

    async def tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """Return the token ids of a text."""
        model = await self._service.model(request.model)
        special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        ids = await self._service.encode(model, request.text, add_special_tokens=special)
        return pb.TokenizeResponse(token_ids=ids, max_model_len=model.info.max_model_len)

    async def detokenize(
        self, request: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        """Return the text of token ids, special tokens written out."""
        model = await self._service.model(request.model)
        ids = list(request.token_ids)
        validate_token_ids(ids, "token_ids", model.info.vocab_size)
        text = model.tokenizer.decode(ids, skip_special_tokens=False)
        return pb.DetokenizeResponse(text=text)

    async def list_models(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """List the served model; nothing before a worker has registered one."""
        served = self._service.served
        if served is None:
            return pb.ListModelsResponse()
        model = pb.Model(id=served.info.name, max_model_len=served.info.max_model_len)
        return pb.ListModelsResponse(models=[model])


def _authorization(context: Context) -> str:
    metadata = context.invocation_metadata() or ()
    values = (value for name, value in metadata if name == "authorization")
    return str(next(values, ""))


def add_inference(
    server: grpc.aio.Server, service: InferenceService, metrics: GatewayMetrics
) -> None:
    """Register the service with a server."""
    servicer = InferenceServicer(service)
    run = CallRunner(SERVICE_NAME, metrics)
    handlers = {
        "Generate": run.stream("Generate", pb.GenerateRequest, servicer.generate),
        "Tokenize": run.unary("Tokenize", pb.TokenizeRequest, servicer.tokenize),
        "Detokenize": run.unary("Detokenize", pb.DetokenizeRequest, servicer.detokenize),
        "ListModels": run.unary("ListModels", pb.ListModelsRequest, servicer.list_models),
    }
    generic = grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)
    server.add_generic_rpc_handlers((generic,))
