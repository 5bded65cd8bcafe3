"""Puts a simulated cluster together and runs a trace through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tandem.core.config import TandemConfig
from tandem.core.errors import ConfigError, IntegrityError
from tandem.kvcache.block_pool import BlockPool
from tandem.kvcache.host_tier import make_host_tier
from tandem.router import Router
from tandem.scheduler import PoolRole, Scheduler, make_policy
from tandem.simulator.clock import Clock
from tandem.simulator.decode import SimulatedDecode
from tandem.simulator.gateway import SimulatedGateway
from tandem.simulator.iterations import IterationLoop
from tandem.simulator.links import Links
from tandem.simulator.prefill import SimulatedPrefill
from tandem.simulator.profile import Profile
from tandem.simulator.report import PoolUse, Report
from tandem.simulator.timeline import Recorder
from tandem.simulator.trace import HASHED_TOKENS, TraceRequest

ROLES: tuple[PoolRole, ...] = ("prefill", "decode")


@dataclass(frozen=True)
class ClusterSpec:
    """What is simulated. No prefill workers: the decode workers prefill, colocated."""

    profile: Profile
    config: TandemConfig
    num_prefill: int
    num_decode: int
    seed: int = 0


def simulate(
    trace: list[TraceRequest],
    spec: ClusterSpec,
    slo: Mapping[str, float] | None = None,
    recorder: Recorder | None = None,
) -> Report:
    """Run a trace to its last token. The same arguments give the same report.

    Raises `IntegrityError` if a block is still held when everything has ended.
    """
    block_size = spec.config.cache.block_size
    if any(request.hash_ids for request in trace) and HASHED_TOKENS % block_size:
        raise ConfigError(f"cache.block_size must divide {HASHED_TOKENS} for traces with hashes")
    clock, report, rpc = Clock(), Report(slo or {}), spec.profile.rpc_seconds
    links = Links(spec.profile.link)
    router = Router(spec.config.gateway.router, block_size, spec.seed)
    gateway = SimulatedGateway(trace, router, clock, report, block_size, rpc)
    loops = {role: _loops(role, spec, trace, clock, report, recorder) for role in ROLES}
    prefill: dict[str, SimulatedPrefill] = {}
    for loop in loops["prefill"]:
        prefill[loop.name] = worker = SimulatedPrefill(
            loop, spec.config.scheduler, clock, links, rpc, recorder
        )
        loop.attach(worker)
    decode: dict[str, SimulatedDecode] = {}
    for loop in loops["decode"]:
        local_max = spec.config.worker.local_prefill_max_tokens
        decode[loop.name] = taker = SimulatedDecode(loop, clock, rpc, local_max, gateway)
        loop.attach(taker)
    gateway.open(prefill, decode)
    clock.run()
    for loop in (*loops["prefill"], *loops["decode"]):
        if loop.scheduler.pool.num_used:
            raise IntegrityError(f"{loop.name}: held to the end: {loop.scheduler.pool.holders()}")
    report.num_preemptions = sum(
        sum(loop.scheduler.num_preempted.values()) for loop in loops["decode"]
    )
    report.kv_bytes = links.num_bytes
    busy = sum(links.busy_seconds.values())
    report.link_busy = busy / max(report.seconds * len(links.busy_seconds), 1e-9)
    return report


def _loops(
    role: PoolRole,
    spec: ClusterSpec,
    trace: list[TraceRequest],
    clock: Clock,
    report: Report,
    recorder: Recorder | None,
) -> list[IterationLoop]:
    """The engine loops of one pool, each around a scheduler and a block pool of its own."""
    profile, cache = spec.profile, spec.config.cache
    number = spec.num_prefill if role == "prefill" else spec.num_decode
    use = report.pools[role] = PoolUse(number)
    caching = cache.prefix_cache and any(request.hash_ids for request in trace)
    loops = []
    for index in range(number):
        pool = BlockPool(cache.num_blocks or profile.num_blocks, cache.block_size, caching)
        policy = make_policy(spec.config.scheduler, role)
        block_bytes = int(profile.link.kv_bytes_per_token * cache.block_size)
        tier = make_host_tier(cache, pool, block_bytes, swaps=role == "decode")
        scheduler = Scheduler(
            spec.config.scheduler, pool, profile.max_model_len, policy, tier, block_bytes
        )
        name = f"{role}-{index}"
        copying = block_bytes / profile.host_bytes_per_second
        loops.append(
            IterationLoop(name, scheduler, profile.iteration, clock, use, recorder, copying)
        )
    return loops
