"""`tandem call`: call any gRPC method through server reflection, JSON in, JSON out.

Knows nothing of Tandem's own protos: what it can call is what the server says that it has.
"""

from __future__ import annotations

from typing import Annotated

import grpc
import typer
from google.protobuf import json_format
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from tandem.commands.terminal import reachable
from tandem.config import load_config
from tandem.core.errors import InvalidRequestError, TandemError, UnavailableError


class CallError(TandemError):
    """The server refused the call. The message names the status code."""


def call(
    method: Annotated[
        str, typer.Argument(help="package.Service/Method; without it, what there is")
    ] = "",
    request: Annotated[str, typer.Argument(help="request as JSON")] = "{}",
    address: Annotated[
        str, typer.Option(help="gRPC address", metavar="HOST:PORT", show_default=False)
    ] = "",
    timeout: Annotated[float | None, typer.Option(help="deadline in seconds")] = None,
) -> None:
    """Call a gRPC method through reflection, JSON in, JSON out."""
    target = address or _default_address()
    with grpc.insecure_channel(target) as channel:
        try:
            database = ProtoReflectionDescriptorDatabase(channel)
            services = sorted(database.get_services())
            pool = DescriptorPool(database)
            if not method:
                _list_methods(pool, services)
                return
            _call(channel, find_method(pool, services, method), request, timeout)
        except grpc.RpcError as error:
            raise _explained(error, target) from error


def find_method(pool: DescriptorPool, services: list[str], method: str) -> MethodDescriptor:
    """Look a method up. Raises `InvalidRequestError` naming what there is instead."""
    service_name, _, method_name = method.rpartition("/" if "/" in method else ".")
    if service_name not in services:
        raise InvalidRequestError(f"no service {service_name!r}; there are {', '.join(services)}")
    service = pool.FindServiceByName(service_name)
    found = service.methods_by_name.get(method_name)
    if found is None:
        names = ", ".join(service.methods_by_name)
        raise InvalidRequestError(f"{service_name} has no method {method_name!r}; it has {names}")
    if found.client_streaming:
        raise InvalidRequestError(f"{method} takes a stream of requests, which this cannot send")
    return found


def _call(
    channel: grpc.Channel, method: MethodDescriptor, request: str, timeout: float | None
) -> None:
    try:
        message = json_format.Parse(request, GetMessageClass(method.input_type)())
    except json_format.ParseError as error:
        raise InvalidRequestError(f"the request is not valid: {error}") from error
    path = f"/{method.containing_service.full_name}/{method.name}"
    answer_class = GetMessageClass(method.output_type)
    if method.server_streaming:
        stream = channel.unary_stream(
            path,
            request_serializer=_serialize,
            response_deserializer=answer_class.FromString,
        )
        for answer in stream(message, timeout=timeout):
            _print(answer)
        return
    unary = channel.unary_unary(
        path, request_serializer=_serialize, response_deserializer=answer_class.FromString
    )
    _print(unary(message, timeout=timeout))


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _print(message: Message) -> None:
    typer.echo(json_format.MessageToJson(message, indent=None))


def _list_methods(pool: DescriptorPool, services: list[str]) -> None:
    for name in services:
        for method in pool.FindServiceByName(name).methods:
            answer = method.output_type.name
            answer = f"stream of {answer}" if method.server_streaming else answer
            typer.echo(f"{name}/{method.name}  {method.input_type.name} -> {answer}")


def _explained(error: grpc.RpcError, target: str) -> TandemError:
    # Every error of a synchronous call is a `grpc.Call` too, which the stubs do not say.
    code: grpc.StatusCode = getattr(error, "code", lambda: grpc.StatusCode.UNKNOWN)()
    details: str = getattr(error, "details", lambda: str(error))() or ""
    if code is grpc.StatusCode.UNAVAILABLE and "connect" in details.lower():
        return UnavailableError(f"no gRPC server answers at {target}; name one with --address")
    return CallError(f"{code.name}: {details}")


def _default_address() -> str:
    gateway = load_config().gateway
    return reachable(gateway.host, gateway.grpc_port)
