"""What the cluster says of itself: its members over gRPC, their counters from Prometheus.

Counters are read before and after a run; the difference is the run's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from urllib.request import urlopen

import grpc
from prometheus_client.parser import text_string_to_metric_families

from tandem.v1 import cluster_pb2, cluster_pb2_grpc

STAGE_SECONDS = "tandem_worker_stage_seconds"
TOTALS = (
    "tandem_worker_prefix_hit_tokens_total",
    "tandem_worker_prefix_query_tokens_total",
    "tandem_worker_kv_bytes_total",
    "tandem_worker_preemptions_total",
    "tandem_worker_recoveries_total",
)
_SCRAPE_SECONDS = 10.0


@dataclass(frozen=True)
class Counters:
    """Sums over all workers of a role, by (role, name)."""

    values: dict[tuple[str, str], float]

    def since(self, before: Counters) -> Counters:
        """Return what was added since an earlier reading."""
        return Counters(
            {key: value - before.values.get(key, 0.0) for key, value in self.values.items()}
        )

    def total(self, role: str, name: str) -> float:
        """Return a counter; 0 if no worker of the role has it."""
        return self.values.get((role, name), 0.0)

    def stage_mean(self, role: str, stage: str) -> float | None:
        """Return the mean seconds of requests in a stage; None if none was in it."""
        count = self.stage_count(role, stage)
        return self.total(role, f"{stage}_seconds_sum") / count if count else None

    def stage_count(self, role: str, stage: str) -> int:
        """Return how many requests went through a stage."""
        return round(self.total(role, f"{stage}_seconds_count"))

    def as_json(self) -> dict[str, float]:
        """Return the counters by name, for the raw results."""
        return {f"{role}/{name}": value for (role, name), value in sorted(self.values.items())}


def cluster_status(controller_address: str) -> cluster_pb2.ClusterStatus:
    """Ask the controller for its workers. Raises `grpc.RpcError` if it does not answer."""
    with grpc.insecure_channel(controller_address) as channel:
        stub = cluster_pb2_grpc.ClusterStub(channel)
        return stub.Status(cluster_pb2.StatusRequest(), timeout=_SCRAPE_SECONDS)


def read_counters(metrics_addresses: Iterable[str]) -> Counters:
    """Read every worker's counters. Raises `OSError` if one does not answer."""
    values: dict[tuple[str, str], float] = {}
    for address in metrics_addresses:
        with urlopen(f"http://{address}/metrics", timeout=_SCRAPE_SECONDS) as answer:
            _add(values, answer.read().decode())
    return Counters(values)


def parse_counters(text: str) -> Counters:
    """Read the counters out of one worker's Prometheus text."""
    values: dict[tuple[str, str], float] = {}
    _add(values, text)
    return Counters(values)


def _add(values: dict[tuple[str, str], float], text: str) -> None:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = _short_name(sample.name, sample.labels)
            if name:
                key = (sample.labels["role"], name)
                values[key] = values.get(key, 0.0) + sample.value


def _short_name(sample: str, labels: dict[str, str]) -> str:
    """`queue_seconds_sum` for a stage's sum, the sample's own name for a total, else ""."""
    suffix = sample.removeprefix(STAGE_SECONDS)
    if suffix in ("_sum", "_count"):
        return f"{labels['stage']}_seconds{suffix}"
    return sample if sample in TOTALS else ""
