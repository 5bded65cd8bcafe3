"""What one process of a worker takes of the machine that it shares: threads, and memory for KV."""

from __future__ import annotations

import os

from tandem.core.config import TandemConfig
from tandem.engine.kv_capacity import Neighbours


def default_threads(config: TandemConfig) -> int:
    """This machine's cores, shared equally by every rank of every worker."""
    return max(1, len(os.sched_getaffinity(0)) // _local_processes(config, "cpu"))


def neighbours_of(config: TandemConfig, device: str) -> Neighbours:
    """Who shares the memory that KV blocks are made in."""
    return Neighbours(_local_processes(config, device), config.scheduler.max_running)


def _local_processes(config: TandemConfig, device: str) -> int:
    """Ranks that share a device's memory: all of them on a CPU, as on one machine."""
    if device != "cpu":
        gpus = config.controller.gpus_per_worker
        return max(1, round(1 / gpus)) if gpus else 1
    ranks = config.controller.decode_workers * config.decode.tensor_parallel
    if config.worker.disaggregated:
        ranks += config.controller.prefill_workers * config.prefill.tensor_parallel
    return ranks
