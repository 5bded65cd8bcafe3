"""What Prometheus sees of a gateway. Counts and times only; decides nothing.

All labels are from small fixed sets. Times are seconds and are measured here, at the edge: from the
arrival of the request, as its client would measure them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from tandem.gateway.interfaces import HandoverTimes, StageTimes

Outcome = Literal[
    "ok", "client_error", "overloaded", "unavailable", "timeout", "error", "cancelled"
]
Api = Literal["http", "grpc"]

_TOKEN_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10,
)  # fmt: skip
_FIRST_TOKEN_BUCKETS = (
    0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 20, 40, 80,
)  # fmt: skip
_REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)


class TokenGaps(Collector):
    """A histogram that is cheap to feed for every token: two additions, no lock.

    Fed and read in one thread, that of the event loop.
    """

    def __init__(self, name: str, documentation: str) -> None:
        self._name = name
        self._documentation = documentation
        self._counts = [0] * (len(_TOKEN_BUCKETS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one gap."""
        self._counts[bisect_left(_TOKEN_BUCKETS, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yield what Prometheus scrapes."""
        bounds = [*map(floatToGoString, _TOKEN_BUCKETS), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._documentation, buckets, self._sum)


def outcome_of_status(status: int) -> Outcome:
    """Return the outcome that an HTTP status stands for."""
    if status < 400:
        return "ok"
    by_status: dict[int, Outcome] = {429: "overloaded", 503: "unavailable", 504: "timeout"}
    return by_status.get(status, "client_error" if status < 500 else "error")


class GatewayMetrics:
    """Every metric of one gateway, in a registry of its own. Is a `DispatchObserver`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = self._counter(
            "requests", "Requests by endpoint and outcome.", "endpoint", "outcome"
        )
        self._in_flight = Gauge(
            "tandem_gateway_requests_in_flight",
            "Requests that are being answered.",
            ["api"],
            registry=self.registry,
        )
        self._latency_metrics()
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished requests.")
        self._completion_tokens = self._counter("completion_tokens", "Tokens that were generated.")
        self._cached_tokens = self._counter(
            "cached_prompt_tokens", "Prompt tokens that no worker had to compute."
        )
        self._kv_bytes = self._counter("kv_transfer_bytes", "KV bytes from prefill workers.")
        self._recoveries = self._counter(
            "recoveries", "Requests moved to another worker, by cause.", "cause"
        )
        self._stale = self._counter(
            "stale_messages",
            "Messages with an old incarnation or attempt that were dropped.",
            "kind",
        )
        self._cache_lookups = self._counter(
            "response_cache_lookups", "Requests that the response cache was asked for.", "result"
        )
        self._cache_bytes = Gauge(
            "tandem_gateway_response_cache_bytes",
            "About what the kept answers take.",
            registry=self.registry,
        )

    def _latency_metrics(self) -> None:
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token.", _FIRST_TOKEN_BUCKETS
        )
        self._itl = TokenGaps(
            "tandem_gateway_inter_token_latency_seconds", "Gap between outputs of one stream."
        )
        self.registry.register(self._itl)
        self._e2e = self._histogram(
            "end_to_end_latency_seconds", "Arrival to last token.", _REQUEST_BUCKETS
        )
        self._queue = self._histogram(
            "queue_seconds", "Submission to first prefill iteration.", _FIRST_TOKEN_BUCKETS
        )
        self._prefill = self._histogram(
            "prefill_seconds", "First prefill iteration to first token.", _FIRST_TOKEN_BUCKETS
        )
        self._transfer = self._histogram(
            "transfer_seconds", "Time that KV of a prompt was on the wire.", _TOKEN_BUCKETS
        )
        self._exposed = self._histogram(
            "exposed_transfer_seconds", "First token to last KV in place.", _TOKEN_BUCKETS
        )
        self._decode = self._histogram(
            "decode_seconds", "First token to last token.", _REQUEST_BUCKETS
        )

    def request_done(self, endpoint: str, outcome: Outcome) -> None:
        """Count an answered request. `endpoint` is a route or a gRPC method, never a raw path."""
        self._requests.labels(endpoint, outcome).inc()

    @contextmanager
    def in_flight(self, api: Api) -> Iterator[None]:
        """Count a request as in flight inside the block."""
        with self._in_flight.labels(api).track_inprogress():
            yield

    def first_token(self, seconds: float) -> None:
        """Observe TTFT."""
        self._ttft.observe(seconds)

    def next_tokens(self, seconds: float) -> None:
        """Observe the gap before a later output; tokens that arrive together share one gap."""
        self._itl.observe(seconds)

    def stages(self, stages: StageTimes) -> None:
        """Observe what the workers report with the first token of an attempt."""
        self._queue.observe(stages.queue_seconds)
        self._prefill.observe(stages.prefill_seconds)

    def handover(self, times: HandoverTimes) -> None:
        """Observe how the KV of a prompt came from a prefill worker."""
        self._transfer.observe(times.transfer_seconds)
        self._exposed.observe(times.exposed_transfer_seconds)
        self._kv_bytes.inc(times.kv_bytes)

    def finished(
        self,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        cached_tokens: int,
        end_to_end_seconds: float,
        decode_seconds: float,
    ) -> None:
        """Count a stream that reached its end."""
        self._e2e.observe(end_to_end_seconds)
        self._decode.observe(decode_seconds)
        self._prompt_tokens.inc(prompt_tokens)
        self._completion_tokens.inc(completion_tokens)
        self._cached_tokens.inc(cached_tokens)

    def recovered(self, cause: str) -> None:
        """Count a request that was moved to another worker."""
        self._recoveries.labels(cause).inc()

    def response_cache_lookup(self, result: str) -> None:
        """Count a request that could be answered from the response cache, `hit` or `miss`."""
        self._cache_lookups.labels(result).inc()

    def response_cache_holds(self, num_bytes: int) -> None:
        """Say how much the response cache holds."""
        self._cache_bytes.set(num_bytes)

    def stale_refused(self, kind: str) -> None:
        """Count a stale message."""
        self._stale.labels(kind).inc()

    def exposition(self) -> bytes:
        """Return the text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(f"tandem_gateway_{name}", documentation, labels, registry=self.registry)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"tandem_gateway_{name}", documentation, buckets=buckets, registry=self.registry
        )
