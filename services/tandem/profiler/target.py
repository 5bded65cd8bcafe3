"""The cluster that is measured: found through its controller, and checked to be measurable."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import NamedTuple
from urllib.request import urlopen

import grpc
from prometheus_client.parser import text_string_to_metric_families

from tandem.core.config import TandemConfig
from tandem.core.errors import ConfigError, UnavailableError
from tandem.modelfiles import read_json, resolve_model
from tandem.profiler.stream import Endpoint
from tandem.v1 import cluster_pb2, cluster_pb2_grpc

_SECONDS = 10.0
_POLL_SECONDS = 0.05
_LAYER_GROUPS = 4


class Done(NamedTuple):
    """What the decode worker has done for prompts so far."""

    kv_bytes: float
    """Received from the prefill worker."""
    wire_seconds: float
    """That their pieces were on the wire."""
    computed: float
    """Tokens of prompts that it computed itself."""

    def since(self, before: Done) -> Done:
        """Return what came after `before`."""
        return Done(*(now - then for now, then in zip(self, before, strict=True)))


@dataclass(frozen=True)
class Target:
    """A cluster of one decode worker and at most one prefill worker, with nothing to do."""

    controller: str
    endpoint: Endpoint
    config: TandemConfig
    decode: cluster_pb2.WorkerStatus
    prefill: cluster_pb2.WorkerStatus | None

    @property
    def max_model_len(self) -> int:
        """Context in tokens."""
        return int(self.decode.model_info.max_model_len)

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return int(self.decode.model_info.vocab_size)

    @property
    def layer_groups(self) -> int:
        """Pieces that the KV of a chunk is sent in, as the engine makes them."""
        path = resolve_model(self.config.model.path)
        layers = int(read_json(path, "config.json")["num_hidden_layers"])
        size = self.config.transfer.layers_per_group or -(-layers // _LAYER_GROUPS)
        return -(-layers // size)

    async def until_idle(self) -> None:
        """Wait until no worker has anything to do. Raises `UnavailableError`."""
        while any(
            worker.running or worker.waiting
            for worker in (await asyncio.to_thread(_status, self.controller)).workers
        ):
            await asyncio.sleep(_POLL_SECONDS)

    async def done(self) -> Done:
        """Ask the decode worker for its counters. Raises `UnavailableError`."""
        return await asyncio.to_thread(self._read_counters)

    def _read_counters(self) -> Done:
        try:
            url = f"http://{self.decode.metrics_address}/metrics"
            with urlopen(url, timeout=_SECONDS) as answer:
                text = answer.read().decode()
        except OSError as error:
            raise UnavailableError(f"{self.decode.name}: no metrics: {error}") from error
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]

        def total(name: str, **labels: str) -> float:
            return sum(
                s.value for s in samples if s.name == name and labels.items() <= s.labels.items()
            )

        return Done(
            kv_bytes=total("tandem_worker_kv_bytes_total"),
            wire_seconds=total("tandem_worker_stage_seconds_sum", stage="transfer"),
            computed=total("tandem_worker_tokens_total", kind="prefill"),
        )


def _status(controller: str) -> cluster_pb2.ClusterStatus:
    try:
        with grpc.insecure_channel(controller) as channel:
            stub = cluster_pb2_grpc.ClusterStub(channel)
            return stub.Status(cluster_pb2.StatusRequest(), timeout=_SECONDS)
    except grpc.RpcError as error:
        raise UnavailableError(f"no controller answers at {controller}") from error


def find_target(config: TandemConfig, controller: str, gateway: str) -> Target:
    """Ask the controller who is there; `config` must be what the cluster was started with.

    Raises `UnavailableError` if nobody answers, `ConfigError` if the cluster cannot be measured.
    """
    return check_target(config, controller, gateway, _status(controller))


def check_target(
    config: TandemConfig, controller: str, gateway: str, status: cluster_pb2.ClusterStatus
) -> Target:
    """Return the target, or raise `ConfigError` saying what is in the way."""
    host, _, port = gateway.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--gateway {gateway!r}: expected HOST:PORT")
    for worker in status.workers:
        if worker.state != cluster_pb2.WORKER_STATE_READY:
            raise ConfigError(f"{worker.name} is not ready: {worker.detail or 'see tandem status'}")
        if worker.running or worker.waiting:
            raise ConfigError(f"{worker.name} is serving; a profile needs the cluster to itself")
    prefill = [worker for worker in status.workers if worker.role == cluster_pb2.ROLE_PREFILL]
    decode = [worker for worker in status.workers if worker.role == cluster_pb2.ROLE_DECODE]
    if len(decode) != 1 or len(prefill) > 1:
        raise ConfigError(
            f"the cluster has {len(prefill)} prefill and {len(decode)} decode workers; a profile "
            "is taken of exactly 1 decode and 0 or 1 prefill workers, so that requests that are "
            "sent together share iterations"
        )
    remote = prefill[0] if prefill and config.worker.disaggregated else None
    return Target(
        controller, Endpoint(host.strip("[]"), int(port), status.model), config, decode[0], remote
    )
