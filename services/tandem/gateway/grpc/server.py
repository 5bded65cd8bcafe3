"""Puts the gRPC edge together."""

from __future__ import annotations

import asyncio

import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tandem.core.config import GatewayConfig
from tandem.core.errors import ConfigError
from tandem.gateway.grpc import health, inference
from tandem.gateway.metrics import GatewayMetrics
from tandem.gateway.service import InferenceService


class GrpcEdge:
    """A gRPC server with a port of its own, in the running event loop."""

    def __init__(
        self, service: InferenceService, config: GatewayConfig, metrics: GatewayMetrics
    ) -> None:
        self._config = config
        # Unless several are to share the port, a second one there is an error, not a rival.
        self._server = grpc.aio.server(
            options=(
                ("grpc.so_reuseport", int(config.processes > 1)),
                ("grpc.max_receive_message_length", config.max_body_bytes),
            )
        )
        inference.add_inference(self._server, service, metrics)
        names = (inference.SERVICE_NAME, health.SERVICE_NAME)
        self._health = health.HealthServicer(service, frozenset(names))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), self._server)
        self._cutting: asyncio.Future[None] | None = None
        self.port = 0
        """Known after `start`."""

    async def start(self) -> None:
        """Bind and serve. Raises `ConfigError` naming the port and its flag if that is not free."""
        host, port = self._config.host, self._config.grpc_port
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(
                f"grpc_port: cannot listen on {address}; is another server running there? "
                "Choose another port with --grpc-port"
            ) from error
        await self._server.start()

    async def stop(self, grace: float) -> None:
        """Refuse new calls at once; cut those in flight after `grace` seconds."""
        self._health.stop()
        await self._server.stop(grace)

    def cut(self) -> None:
        """End a stop that is under way: cancel the calls in flight now."""
        self._cutting = asyncio.ensure_future(self._server.stop(0))
