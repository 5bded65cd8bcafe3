"""Prometheus metrics of one worker, served by the worker itself.

Histograms are in seconds, sizes in bytes or tokens; every series carries `worker` and `role`.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from tandem.kvcache.block_pool import BlockPool
from tandem.kvcache.host_tier import CopyKind
from tandem.scheduler.preemption import Way

_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_LABELS = ("worker", "role")


class WorkerMetrics:
    """The series of one worker. Attributes are bound to its labels already."""

    def __init__(self, worker: str, role: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = (worker, role)
        self._seen: Counts[tuple[Counter, str]] = Counts()
        self._define_requests()
        self._define_tokens()
        self._define_lending()
        self._define_blocks()
        self._define_iterations()

    def _define_requests(self) -> None:
        """What becomes of requests, and how long it takes."""
        self.requests = self._counter(
            "tandem_worker_requests_total", "Requests by outcome.", ("outcome",)
        )
        self.running = self._gauge("tandem_worker_running_requests", "Sequences that hold blocks.")
        self.waiting = self._gauge("tandem_worker_waiting_requests", "Sequences in the queue.")
        self.recoveries = self._counter(
            "tandem_worker_recoveries_total", "Prefills started again, by cause.", ("cause",)
        )
        self.stale = self._counter(
            "tandem_worker_stale_messages_total", "Messages refused for their stamp."
        )
        self.stage_seconds = self._histogram(
            "tandem_worker_stage_seconds",
            "Time of a request in a stage: queue, prefill, transfer, transfer_exposed, decode.",
            _SECONDS,
            ("stage",),
        )

    def _define_tokens(self) -> None:
        """What was computed, and what need not be."""
        self.tokens = self._counter(
            "tandem_worker_tokens_total", "Tokens computed, by kind.", ("kind",)
        )
        self.cached_tokens = self._counter(
            "tandem_worker_prefix_hit_tokens_total", "Prompt tokens found in the prefix cache."
        )
        self.queried_tokens = self._counter(
            "tandem_worker_prefix_query_tokens_total",
            "Prompt tokens looked up in the prefix cache.",
        )
        self.kept_tokens = self._counter(
            "tandem_worker_kept_tokens_total", "Tokens whose KV outlived their prefill worker."
        )

    def _define_lending(self) -> None:
        """What one pool does for the other."""
        self.moves = self._counter(
            "tandem_worker_moved_prompts_total",
            "Prompts that went from one pool to the other, by direction: here, away.",
            ("direction",),
        )
        self.lent_requests = self._counter(
            "tandem_worker_lent_requests_total",
            "Requests served with this worker's slack for the other pool: prompts on a decode "
            "worker, decoding on a prefill worker.",
        )
        self.lent_tokens = self._counter(
            "tandem_worker_lent_tokens_total", "Tokens computed for such requests."
        )

    def _define_blocks(self) -> None:
        """Where KV is, and how it moves."""
        self.blocks = self._gauge("tandem_worker_kv_blocks", "KV blocks by state.", ("state",))
        self.unused_slots = self._gauge(
            "tandem_worker_kv_unused_slots",
            "Token slots of held blocks that no token of their sequence takes: fragmentation.",
        )
        self.preemptions = self._counter(
            "tandem_worker_preemptions_total",
            "Times that a sequence gave its blocks up, or waited for one, by way.",
            ("way",),
        )
        self.host_blocks = self._gauge(
            "tandem_worker_host_blocks", "KV blocks in host memory by state.", ("state",)
        )
        self.host_copies = self._counter(
            "tandem_worker_host_copied_blocks_total",
            "KV blocks copied between the device and host memory, by what for.",
            ("kind",),
        )
        self.kv_bytes = self._counter("tandem_worker_kv_bytes_total", "KV bytes received.")
        self.links = self._gauge("tandem_worker_kv_links", "Open KV links.")

    def _define_iterations(self) -> None:
        """What iterations are made of, and by which policy."""
        self.policy = self._gauge(
            "tandem_worker_scheduling_policy", "1 for the policy that is followed.", ("policy",)
        )
        self.iteration_seconds = self._histogram(
            "tandem_worker_iteration_seconds", "Duration of an iteration.", _SECONDS
        )
        self.iteration_tokens = self._histogram(
            "tandem_worker_iteration_tokens", "Tokens computed by an iteration.", _SIZES
        )
        self.iteration_sequences = self._histogram(
            "tandem_worker_iteration_sequences", "Sequences in an iteration.", _SIZES
        )

    def serve(self, host: str) -> str:
        """Serve the registry over HTTP on a free port; returns host:port."""
        server, _ = start_http_server(0, addr=host, registry=self.registry)
        return f"{host}:{server.server_port}"

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        counter = Counter(name, text, (*_LABELS, *labels), registry=self.registry)
        return counter if labels else counter.labels(*self._labels)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        gauge = Gauge(name, text, (*_LABELS, *labels), registry=self.registry)
        return gauge if labels else gauge.labels(*self._labels)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()
    ) -> Histogram:
        histogram = Histogram(
            name, text, (*_LABELS, *labels), buckets=buckets, registry=self.registry
        )
        return histogram if labels else histogram.labels(*self._labels)

    def count_request(self, outcome: str) -> None:
        self.requests.labels(*self._labels, outcome).inc()

    def count_move(self, direction: str) -> None:
        self.moves.labels(*self._labels, direction).inc()

    def count_recovery(self, cause: str) -> None:
        self.recoveries.labels(*self._labels, cause).inc()

    def count_tokens(self, kind: str, amount: int) -> None:
        self.tokens.labels(*self._labels, kind).inc(amount)

    def count_prefix_lookup(self, queried: int, found: int) -> None:
        """One look into the prefix cache, in tokens, of a sequence that was admitted."""
        self.queried_tokens.inc(queried)
        self.cached_tokens.inc(found)

    def observe_stage(self, stage: str, seconds: float) -> None:
        self.stage_seconds.labels(*self._labels, stage).observe(seconds)

    def set_preemptions(self, totals: Mapping[Way, int]) -> None:
        for way, total in totals.items():
            self._count_up(self.preemptions, way, total)

    def set_host_copies(self, totals: Mapping[CopyKind, int]) -> None:
        for kind, total in totals.items():
            self._count_up(self.host_copies, kind, total)

    def _count_up(self, counter: Counter, label: str, total: int) -> None:
        """Bring a series up to a total that is counted elsewhere."""
        counter.labels(*self._labels, label).inc(total - self._seen[counter, label])
        self._seen[counter, label] = total

    def set_blocks(self, pool: BlockPool) -> None:
        self._set_states(self.blocks, pool)

    def set_host_blocks(self, pool: BlockPool) -> None:
        self._set_states(self.host_blocks, pool)

    def _set_states(self, gauge: Gauge, pool: BlockPool) -> None:
        used, cached = pool.num_used, pool.num_cached
        free = pool.num_blocks - used - cached
        for state, count in (("used", used), ("cached", cached), ("free", free)):
            gauge.labels(*self._labels, state).set(count)

    def set_policy(self, name: str) -> None:
        self.policy.labels(*self._labels, name).set(1)
