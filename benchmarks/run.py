"""One run: start a cluster, warm it up, replay the workload, read what it cost, stop it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.client import LoadError, run_client
from benchmarks.launch import RunningCluster, running_cluster
from benchmarks.load import ClientCost, LoadJob
from benchmarks.machine import CpuUse
from benchmarks.measures import RequestRecord, ratio, summarize
from benchmarks.report import Figures
from benchmarks.scenario import Mode, Scenario
from benchmarks.scrape import Counters, read_counters
from benchmarks.workload import PlannedRequest

WARM_UP_REQUESTS = 3
WARM_UP_PROMPT = 128
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class RunResult:
    """Everything one run left."""

    mode: Mode
    figures: Figures
    records: list[RequestRecord]
    client: ClientCost
    counters: Counters
    start_seconds: float
    worker_niceness: int
    foreign_share: float
    """Part of the machine's CPU time that neither the cluster nor the client used."""

    def as_json(self) -> dict[str, Any]:
        """Return the run for the raw results; times to a hundredth of a millisecond."""
        return {
            "mode": self.mode,
            "figures": self.figures,
            "client": asdict(self.client),
            "counters": self.counters.as_json(),
            "start_seconds": round(self.start_seconds, 2),
            "worker_niceness": self.worker_niceness,
            "foreign_share": round(self.foreign_share, 4),
            "records": [_rounded(record) for record in self.records],
        }


def measure(
    scenario: Scenario, mode: Mode, requests: Sequence[PlannedRequest], niceness: int
) -> RunResult:
    """Run one workload on one cluster. Raises `ClusterError` or `LoadError`."""
    with running_cluster(scenario.config(mode)) as cluster:
        warmed_up, _ = replay(scenario, cluster, _warm_up(requests), niceness)
        if failed := [record.error for record in warmed_up if not record.ok]:
            raise LoadError(f"a request of the warm-up failed: {failed[0] or 'tokens are missing'}")
        counters = read_counters(cluster.metrics_addresses)
        cpu = CpuUse.now(cluster.pid)
        records, client = replay(scenario, cluster, requests, niceness)
        after = CpuUse.now(cluster.pid)
        counters = read_counters(cluster.metrics_addresses).since(counters)
    figures = summarize(records, scenario.objectives)
    figures.update(stage_figures(counters, figures["ttft_mean"]))
    foreign = after.foreign_since(cpu, client.cpu_seconds)
    capacity = (figures["duration"] or 0.0) * len(os.sched_getaffinity(0))
    figures["cpu_share"] = ratio(after.tree_since(cpu), capacity)
    return RunResult(
        mode=mode,
        figures=figures,
        records=records,
        client=client,
        counters=counters,
        start_seconds=cluster.start_seconds,
        worker_niceness=cluster.worker_niceness,
        foreign_share=ratio(foreign, capacity) or 0.0,
    )


def stage_figures(counters: Counters, ttft_mean: float | None) -> Figures:
    """Return what the workers' own counters add to the client's figures.

    The exposed share is the mean exposed transfer of the requests that were handed over, over
    the mean TTFT of all; None when nothing was handed over.
    """
    exposed = counters.stage_mean("decode", "transfer_exposed")
    handed_over = counters.stage_count("decode", "transfer_exposed")
    figures: Figures = {
        "handed_over": float(handed_over),
        "exposed_mean": exposed,
        "transfer_mean": counters.stage_mean("decode", "transfer"),
        "kv_bytes": counters.total("decode", "tandem_worker_kv_bytes_total"),
        "preemptions": counters.total("decode", "tandem_worker_preemptions_total"),
        "exposed_share": None,
    }
    if exposed is not None and ttft_mean:
        figures["exposed_share"] = exposed / ttft_mean
    return figures


def _warm_up(requests: Sequence[PlannedRequest]) -> list[PlannedRequest]:
    """The ends of the longest prompts, reversed so that no cached prefix of them helps the run."""
    longest = sorted(requests, key=lambda request: -len(request.prompt))[:WARM_UP_REQUESTS]
    return [
        PlannedRequest(
            index, 0.0, request.prompt[: -WARM_UP_PROMPT - 1 : -1], WARM_UP_TOKENS, shared=False
        )
        for index, request in enumerate(longest)
    ]


def replay(
    scenario: Scenario,
    cluster: RunningCluster,
    requests: Sequence[PlannedRequest],
    niceness: int,
) -> tuple[list[RequestRecord], ClientCost]:
    """Let the load client send the requests, in its own process. Raises `LoadError`."""
    job = LoadJob(
        host=cluster.host,
        port=cluster.port,
        model=scenario.key,
        timeout=scenario.request_timeout,
        niceness=niceness,
        requests=tuple(requests),
    )
    return run_client(job)


def _rounded(record: RequestRecord) -> dict[str, Any]:
    content = asdict(record)
    for name in ("scheduled_at", "sent_at"):
        content[name] = round(content[name], 5)
    content["token_times"] = [round(moment, 5) for moment in record.token_times]
    return content
