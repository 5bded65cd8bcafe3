"""What a worker says of itself: its line in `tandem status`, and the gauges among its metrics."""

from __future__ import annotations

import os
import platform
import time
from typing import TYPE_CHECKING

from tandem.kvcache.host_tier import HostTier
from tandem.scheduler import policy_name
from tandem.v1 import cluster_pb2

if TYPE_CHECKING:
    from tandem.worker.runtime import WorkerRuntime


def worker_status(runtime: WorkerRuntime) -> cluster_pb2.WorkerStatus:
    """Describe a loaded worker. Any thread."""
    pool, scheduler, endpoint = runtime.pool, runtime.scheduler, runtime.endpoint
    status = cluster_pb2.WorkerStatus(
        name=runtime.name,
        role=cluster_pb2.Role.Value(f"ROLE_{runtime.role_name.upper()}"),
        state=cluster_pb2.WORKER_STATE_READY,
        pid=os.getpid(),
        node=platform.node(),
        device=runtime.core_claim.describe(runtime.device),
        incarnation=runtime.incarnation,
        address=endpoint.address if endpoint else "",
        metrics_address=endpoint.metrics_address if endpoint else "",
        running=scheduler.num_running,
        waiting=scheduler.num_waiting,
        blocks_used=pool.num_used,
        blocks_cached=pool.num_cached,
        blocks_total=pool.num_blocks,
        links=runtime.links.budget.num_open,
        tokens_per_second=runtime.token_rate.per_second(time.monotonic()),
        iterations=runtime.iterations,
        policy=policy_name(runtime.config.scheduler, runtime.role_name),
        kernels=runtime.engine.kernels,
        preemptions=dict(scheduler.num_preempted.items()),
        tensor_parallel=runtime.tensor_parallel,
        lent_requests=runtime.lent_requests,
        lent_tokens=runtime.lent_tokens,
        kv_capacity=str(runtime.engine.kv_capacity),
        model=runtime.model_name,
        model_info=_model_info(runtime),
    )
    if runtime.host_tier is not None:
        _add_host_blocks(status, runtime.host_tier)
    return status


def _model_info(runtime: WorkerRuntime) -> cluster_pb2.ModelInfo:
    spec, cache = runtime.engine.spec, runtime.config.cache
    return cluster_pb2.ModelInfo(
        name=runtime.model_name,
        path=str(runtime.model_path),
        max_model_len=spec.max_model_len,
        block_size=cache.block_size,
        vocab_size=spec.vocab_size,
        no_prefix_cache=not cache.prefix_cache,
    )


def _add_host_blocks(status: cluster_pb2.WorkerStatus, host_tier: HostTier) -> None:
    pool = host_tier.pool
    status.host_blocks_used = pool.num_used
    status.host_blocks_cached = pool.num_cached
    status.host_blocks_total = pool.num_blocks
    for kind, copied in host_tier.blocks_copied.items():
        status.host_blocks_copied[kind] = copied


def publish_gauges(runtime: WorkerRuntime) -> None:
    """Bring the gauges, and counters of what is counted elsewhere, up to date. Engine thread."""
    metrics, scheduler, host_tier = runtime.metrics, runtime.scheduler, runtime.host_tier
    metrics.running.set(scheduler.num_running)
    metrics.waiting.set(scheduler.num_waiting)
    metrics.unused_slots.set(scheduler.num_unused_slots)
    metrics.set_preemptions(scheduler.num_preempted)
    metrics.set_blocks(runtime.pool)
    metrics.links.set(runtime.links.budget.num_open)
    if host_tier is not None:
        metrics.set_host_blocks(host_tier.pool)
        metrics.set_host_copies(host_tier.blocks_copied)
