"""Puts a simulated cluster together and runs a trace through it."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from tandem.core.config import TandemConfig
from tandem.core.errors import ConfigError, IntegrityError
from tandem.kvcache.block_pool import BlockPool
from tandem.kvcache.host_tier import make_host_tier
from tandem.router import Router
from tandem.scheduler import PoolRole, Scheduler, make_policy
from tandem.scheduler.steady import is_indifferent
from tandem.simulator.clock import Clock
from tandem.simulator.decode import SimulatedDecode
from tandem.simulator.gateway import SimulatedGateway
from tandem.simulator.iterations import IterationLoop
from tandem.simulator.links import Links
from tandem.simulator.machines import Machine, WorkerTime
from tandem.simulator.prefill import SimulatedPrefill
from tandem.simulator.profile import LinkCost, Profile
from tandem.simulator.report import PoolUse, Report
from tandem.simulator.trace import HASHED_TOKENS, TraceRequest
from tandem.timeline.events import Timeline

_NO_LINK = LinkCost(bytes_per_second=1.0, kv_bytes_per_token=1.0)
ROLES: tuple[PoolRole, ...] = ("prefill", "decode")


@dataclass(frozen=True)
class ClusterSpec:
    """What is simulated. No prefill workers: the decode workers prefill, colocated."""

    profile: Profile
    config: TandemConfig
    num_prefill: int
    num_decode: int
    seed: int = 0
    leaps: bool = True
    """Take stretches of equal decode steps at once. The report is the same but for rounding."""


def simulate(
    trace: list[TraceRequest],
    spec: ClusterSpec,
    slo: Mapping[str, float] | None = None,
    recorder: Timeline | None = None,
) -> Report:
    """Run a trace to its last token. The same arguments give the same report.

    Raises `IntegrityError` if a block is held, or a prompt counted, when everything has ended.
    """
    spec = spec if spec.num_prefill else _without_lending(spec)
    config = spec.config
    block_size = config.cache.block_size
    if any(request.hash_ids for request in trace) and HASHED_TOKENS % block_size:
        raise ConfigError(f"cache.block_size must divide {HASHED_TOKENS} for traces with hashes")
    clock, report, rpc = Clock(), Report(slo or {}), spec.profile.rpc_seconds
    if spec.profile.link is None and spec.num_prefill:
        raise ConfigError(
            f"profile {spec.profile.name} has no link, which prefill workers need: measure one of "
            "a cluster with a prefill worker, or simulate without (--prefill 0)"
        )
    links = Links(spec.profile.link or _NO_LINK)
    router = Router(config.gateway.router, block_size, spec.seed)
    way = spec.profile.gateway_seconds + rpc
    gateway = SimulatedGateway(trace, router, clock, report, block_size, way, recorder)
    machines = _machines(spec)
    loops = {role: _loops(role, spec, trace, clock, report, recorder, machines) for role in ROLES}
    prefill: dict[str, SimulatedPrefill] = {}
    for loop in loops["prefill"]:
        prefill[loop.name] = worker = SimulatedPrefill(loop, config, clock, links, rpc, recorder)
        loop.attach(worker)
    decode: dict[str, SimulatedDecode] = {}
    for loop in loops["decode"]:
        decode[loop.name] = taker = SimulatedDecode(loop, clock, rpc, config, gateway)
        loop.attach(taker)
    gateway.open(prefill, decode)
    with _no_garbage_collection():
        clock.run()
    for loop in (*loops["prefill"], *loops["decode"]):
        if loop.scheduler.pool.num_used:
            raise IntegrityError(f"{loop.name}: held to the end: {loop.scheduler.pool.holders()}")
    for worker in prefill.values():
        if worker.num_pending:
            raise IntegrityError(f"{worker.name}: {worker.num_pending} tokens counted to the end")
    report.num_preemptions = sum(
        sum(loop.scheduler.num_preempted.values()) for loop in loops["decode"]
    )
    report.kv_bytes = links.num_bytes
    busy = sum(links.busy_seconds.values())
    report.link_busy = busy / max(report.seconds * len(links.busy_seconds), 1e-9)
    return report


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Requests come and go without cycles: walking them all again and again finds nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _without_lending(spec: ClusterSpec) -> ClusterSpec:
    """Without prefill workers nothing is lent, and nobody need learn what it would cost."""
    lending = spec.config.lending.model_copy(update={"mode": "threshold"})
    return replace(spec, config=spec.config.model_copy(update={"lending": lending}))


def _loops(
    role: PoolRole,
    spec: ClusterSpec,
    trace: list[TraceRequest],
    clock: Clock,
    report: Report,
    recorder: Timeline | None,
    machines: Mapping[tuple[PoolRole, int], Machine],
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
        token_bytes = profile.link.kv_bytes_per_token if profile.link is not None else 0
        block_bytes = int(token_bytes * cache.block_size)
        tier = make_host_tier(cache, pool, block_bytes, swaps=role == "decode")
        scheduler = Scheduler(
            spec.config.scheduler, pool, profile.max_model_len, policy, tier, block_bytes
        )
        name = f"{role}-{index}"
        machine, seed = machines[role, index], 2 * index + (role == "prefill")
        time = WorkerTime(profile.iteration, profile.shared, machine, role, seed)
        learns = (
            spec.config.lending.mode == "measured"
            or spec.config.scheduler.preemption != "refill"
            or not is_indifferent(policy)
        )
        copying = block_bytes / profile.host_bytes_per_second
        loops.append(
            IterationLoop(
                name, scheduler, time, clock, use, recorder, spec.leaps, copying, learns=learns
            )
        )
    return loops


def _machines(spec: ClusterSpec) -> dict[tuple[PoolRole, int], Machine]:
    """Where each worker runs: prefill and decode workers in turn, so many to a machine."""
    numbers = {"prefill": spec.num_prefill, "decode": spec.num_decode}
    most = max(numbers.values())
    workers = [(role, index) for index in range(most) for role in ROLES if index < numbers[role]]
    machines: list[Machine] = []
    placed = {}
    for place, worker in enumerate(workers):
        if place % spec.profile.shared.workers == 0:
            machines.append(Machine())
        placed[worker] = machines[-1]
    return placed
