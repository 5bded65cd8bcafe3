"""Around every gRPC call: parsing, status codes, metrics.

The bytes of a request are parsed here and not by the library, which would answer a message that
cannot be parsed (invalid UTF-8, say) with INTERNAL, as if it were our fault.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError, Message

from tandem.core.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    TandemError,
)
from tandem.gateway.metrics import GatewayMetrics, Outcome, outcome_of_status

Context = grpc.aio.ServicerContext[Any, Any]
UnaryBehaviour = Callable[[Any, Context], Awaitable[Message]]
StreamBehaviour = Callable[[Any, Context], AsyncGenerator[Message, None]]
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_log = structlog.get_logger(__name__)


class CallRunner:
    """Makes gRPC method handlers out of plain behaviours."""

    def __init__(self, service_name: str, metrics: GatewayMetrics) -> None:
        self._service = service_name
        self._metrics = metrics

    def unary(
        self, name: str, request_type: type[Message], behaviour: UnaryBehaviour
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Return the handler of a call with one answer."""

        async def handle(data: bytes, context: Context) -> Message:
            with self._metrics.in_flight("grpc"):
                try:
                    answer = await behaviour(_parse(request_type, data), context)
                except BaseException as error:
                    await self._fail(name, error, context)
                self._done(name, "ok")
                return answer

        return grpc.unary_unary_rpc_method_handler(handle, None, _serialize)

    def stream(
        self, name: str, request_type: type[Message], behaviour: StreamBehaviour
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Return the handler of a call with a stream of answers."""

        async def handle(data: bytes, context: Context) -> AsyncGenerator[Message, None]:
            with self._metrics.in_flight("grpc"):
                try:
                    answers = behaviour(_parse(request_type, data), context)
                    async with aclosing(answers), asyncio.timeout(context.time_remaining()):
                        async for answer in answers:
                            yield answer
                except BaseException as error:
                    await self._fail(name, error, context)
                self._done(name, "ok")

        return grpc.unary_stream_rpc_method_handler(handle, None, _serialize)

    async def _fail(self, name: str, error: BaseException, context: Context) -> NoReturn:
        """End the call with the status of an error; let a cancellation travel."""
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            self._done(name, "cancelled")
            raise error
        if isinstance(error, TimeoutError):
            error = DeadlineExceededError("the deadline of the call has passed")
        if not isinstance(error, TandemError):
            _log.error("call failed", method=name, exc_info=error)
            self._done(name, "error")
            await context.abort(grpc.StatusCode.INTERNAL, "internal error")
        self._done(name, outcome_of_status(error.http_status))
        await context.abort(_CODES[error.grpc_code], error.message, _trailers(error))

    def _done(self, name: str, outcome: Outcome) -> None:
        self._metrics.request_done(f"{self._service}/{name}", outcome)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _parse(request_type: type[Message], data: bytes) -> Message:
    try:
        return request_type.FromString(data)
    except DecodeError as error:
        raise InvalidRequestError(
            f"the request is not a valid {request_type.DESCRIPTOR.full_name}: {error}"
        ) from error


def _trailers(error: TandemError) -> tuple[tuple[str, str], ...]:
    """What a client may act on without reading the message."""
    trailers = []
    if isinstance(error, OverloadedError):
        trailers.append(("retry-after-ms", str(max(1, round(error.retry_after * 1000)))))
    if error.param:
        trailers.append(("error-param", error.param))
    if error.code:
        trailers.append(("error-code", error.code))
    return tuple(trailers)
