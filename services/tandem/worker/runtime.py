"""What a worker of either kind is made of: engine, pool, scheduler, threads, server, metrics.

Builds and owns them and answers the controller. Decides nothing about requests: that is for the
prefill and decode packages, which plug in a `Role`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import grpc.aio
import structlog
import torch

from tandem.core.config import TandemConfig
from tandem.core.errors import StaleError
from tandem.core.sequence import IterationPlan, Sequence
from tandem.engine.engine import Engine
from tandem.engine.parallel.shard import check_degree
from tandem.engine.spec import load_spec
from tandem.kvcache.block_pool import BlockPool
from tandem.kvcache.host_tier import BlockCopy, HostTier, make_host_tier
from tandem.kvcache.prefix_journal import PrefixJournal
from tandem.kvcache.storage import HostStorage
from tandem.modelfiles import resolve_model, served_name
from tandem.scheduler import Policy, PoolRole, Scheduler, make_policy, policy_name
from tandem.scheduler.costs import work_of
from tandem.tracing.buffer import TraceBuffer
from tandem.tracing.service import add_tracing
from tandem.transfer import make_kv_spec
from tandem.v1 import cluster_pb2, worker_pb2_grpc
from tandem.worker.affinity import CoreClaim
from tandem.worker.engine_loop import EngineLoop
from tandem.worker.event_loop import EventLoopThread
from tandem.worker.host_copier import HostCopier
from tandem.worker.links import WorkerLinks
from tandem.worker.liveness import check_incarnation
from tandem.worker.metrics import WorkerMetrics
from tandem.worker.ranks import RankAddress, WorkerRanks
from tandem.worker.service import WorkerService
from tandem.worker.shares import default_threads, neighbours_of
from tandem.worker.status import publish_gauges, worker_status
from tandem.worker.token_rate import TokenRate

log = structlog.get_logger(__name__)

Progress = Callable[[str, float], None]
SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
)


class WorkerEndpoint(NamedTuple):
    """Where a started worker is reached."""

    address: str
    metrics_address: str
    incarnation: int
    pid: int


class Role(Protocol):
    """What a prefill or decode worker plugs into the runtime."""

    def step(self) -> bool:
        """Run one iteration in the engine thread; returns whether there is more to do at once."""

    def add_servicers(self, server: grpc.aio.Server) -> None:
        """Register this role's gRPC service."""

    def restored(self, sequence: Sequence) -> None:
        """KV of an admitted sequence is back from host memory: let it go on. Engine thread."""

    def tick(self) -> None:
        """Check deadlines, in the engine thread, at every heartbeat interval."""

    def drop_everything(self) -> None:
        """Cancel every request, stream and link, in the engine thread: the incarnation is burnt."""


class WorkerRuntime:
    """The parts of one worker. `load`, then `serve`, then `stop`."""

    def __init__(
        self,
        name: str,
        role: PoolRole,
        config: TandemConfig,
        device: str,
        progress: Progress | None = None,
    ) -> None:
        self.name = name
        self.role_name = role
        self.config = config
        self.device = device
        self.incarnation = time.time_ns()
        self.iterations = 0
        self.progress = 0
        """Grows with every iteration, and with those of prefill workers that work for this one."""
        self.lent_requests = 0
        self.lent_tokens = 0
        self.metrics = WorkerMetrics(name, role)
        self.metrics.set_policy(policy_name(config.scheduler, self.role_name))
        self.trace = TraceBuffer(name, config.tracing.max_events, always=config.tracing.always)
        self.endpoint: WorkerEndpoint | None = None
        self._progress = progress or (lambda stage, fraction: None)
        self.token_rate = TokenRate()
        self.tensor_parallel = config.tensor_parallel(role)
        self._ranks: WorkerRanks | None = None
        if self.tensor_parallel > 1:
            self._ranks = WorkerRanks(name, self.tensor_parallel, config.worker)

    @property
    def rank_address(self) -> RankAddress | None:
        """Where the other ranks join, from the start on; None for a worker of one rank."""
        return None if self._ranks is None else self._ranks.address

    def load(self) -> None:
        """Load weights, make the KV blocks and warm up. Raises `ModelLoadError`, `ConfigError`."""
        config = self.config
        policy = make_policy(config.scheduler, self.role_name)
        self.core_claim = CoreClaim(config.worker.cpu_affinity)
        cores = self.core_claim.cores
        torch.set_num_threads(config.worker.threads or len(cores) or default_threads(config))
        self._load_engine()
        self._manage_blocks(policy)
        spec, storage = self.engine.spec, self.engine.storage
        self.kv_spec = make_kv_spec(
            *(self.model_name, spec.revision, storage, config.transfer),
            num_kv_heads=spec.num_kv_heads,
            tensor_parallel=self.tensor_parallel,
        )
        self.links = WorkerLinks(storage, self.kv_spec, config, self.trace, self._ranks)
        self._progress("warming up", 0.0)
        self.engine.warm_up()
        if self.overlaps:
            self.engine.compute_ahead(*cores[:1])
        self._progress("ready", 1.0)

    def _load_engine(self) -> None:
        """Load the model, together with the other ranks where there are any."""
        config = self.config
        self.model_path = resolve_model(config.model.path)
        decoder = load_spec(self.model_path, config.model, self.device).decoder
        check_degree(f"{self.role_name}.tensor_parallel", decoder, self.tensor_parallel)
        if self._ranks is not None:
            self._progress("waiting for its other ranks", 0.0)
            self._ranks.join(self.device)
        self.engine = Engine(
            self.model_path,
            config.model,
            config.cache,
            self.device,
            layers_per_group=config.transfer.layers_per_group,
            progress=self._progress,
            neighbours=neighbours_of(config, self.device),
            announcer=self._ranks,
        )
        self.engine.pin(self.core_claim.cores)
        if self._ranks is not None:
            self._ranks.await_loaded()

    def _manage_blocks(self, policy: Policy) -> None:
        """Make what hands out the engine's KV blocks, and room for more of them in host memory."""
        cache, storage = self.config.cache, self.engine.storage
        self.pool = BlockPool(storage.num_blocks, cache.block_size, cache.prefix_cache)
        block_bytes = storage.bytes_per_token * cache.block_size
        self.host_tier: HostTier | None = None
        self._copier: HostCopier | None = None
        if self.tensor_parallel == 1:  # other ranks hold heads that rank 0 cannot copy
            swaps = self.role_name == "decode"
            self.host_tier = make_host_tier(cache, self.pool, block_bytes, swaps=swaps)
        if self.host_tier is not None:
            kv_in_host = HostStorage(storage, self.host_tier.pool.num_blocks)
            self._copier = HostCopier(self.name, kv_in_host, storage.device, self._post_copied)
        in_host = None if self.host_tier is None else self.host_tier.pool
        self.journal = PrefixJournal(self.pool, in_host)
        max_model_len = self.engine.spec.max_model_len
        self.scheduler = Scheduler(
            self.config.scheduler, self.pool, max_model_len, policy, self.host_tier, block_bytes
        )

    def serve(self, role: Role) -> WorkerEndpoint:
        """Start the threads and the gRPC server; returns once it listens."""
        core = self.core_claim.cores[0] if self.core_claim.cores and not self.overlaps else None
        self.loop = EngineLoop(self.name, role.step, core)
        self.events = EventLoopThread(self.name)
        self._role = role
        address = self.events.run(self._start_server(role))
        metrics_address = self.metrics.serve(self.config.worker.host)
        self.endpoint = WorkerEndpoint(address, metrics_address, self.incarnation, os.getpid())
        self.loop.start()
        self._ticker = self.events.spawn(self._tick())
        log.info("worker ready", worker=self.name, address=address, device=self.device)
        return self.endpoint

    def stop(self) -> None:
        """Drop what is in flight, end the streams, then the threads."""
        self.loop.post(self._role.drop_everything)
        self.loop.stop()
        if self._ranks is not None:
            self._ranks.stop()
        self.events.run(self._server.stop(grace=0.5), timeout=5.0)
        self.events.stop()
        self.core_claim.release()

    def adopt(self, incarnation: int) -> None:
        """Take a new incarnation after the old one was burnt. Engine thread."""
        log.warning("incarnation burnt", worker=self.name, old=self.incarnation, new=incarnation)
        self._role.drop_everything()
        self.incarnation = incarnation

    def check_integrity(self) -> None:
        """Raise `IntegrityError` if a block pool contradicts itself. Engine thread."""
        self.pool.check_integrity()
        if self.host_tier is not None:
            self.host_tier.pool.check_integrity()

    @property
    def overlaps(self) -> bool:
        """Whether the next iteration is scheduled while one computes."""
        setting = self.config.scheduler.overlap
        on = setting == "on" or (setting == "auto" and self.device.startswith("cuda"))
        return on and self.role_name == "decode"

    def iterate(self, plan: IterationPlan, run: Callable[[], None]) -> None:
        """Run one planned iteration and account for it."""
        began = time.monotonic()
        run()
        self.account(plan, began, time.monotonic())

    def account(self, plan: IterationPlan, began: float, ended: float) -> None:
        """Note that an iteration has ended."""
        seconds, metrics = ended - began, self.metrics
        self.trace.iteration(plan, began, ended)
        self.scheduler.measured(work_of(plan.chunks), seconds)
        metrics.iteration_seconds.observe(seconds)
        metrics.iteration_tokens.observe(plan.num_tokens)
        metrics.iteration_sequences.observe(len(plan.chunks))
        self.iterations += 1
        self.progress += 1

    def start_copies(self) -> None:
        """Begin the copies to and from host memory that the last plan asks for."""
        copies = self.scheduler.take_copies()
        if copies and self._copier is not None:
            ready = self.engine.record_event()
            for copy in copies:
                self._copier.submit(copy, ready)

    def _post_copied(self, copy: BlockCopy, seconds: float, succeeded: bool) -> None:
        self.loop.post(self._copied, copy, seconds, succeeded)

    def _copied(self, copy: BlockCopy, seconds: float, succeeded: bool) -> None:
        sequence = self.scheduler.copied(copy, seconds, succeeded=succeeded)
        if sequence is not None:
            self._role.restored(sequence)

    def count_tokens(self, kind: str, amount: int) -> None:
        """Count tokens computed, for the metrics and for the rate in `tandem status`."""
        self.metrics.count_tokens(kind, amount)
        self.token_rate.add(amount, time.monotonic())

    def count_lent(self, tokens: int, requests: int = 0) -> None:
        """Count what was computed with this worker's slack for the other pool."""
        self.lent_tokens += tokens
        self.lent_requests += requests
        self.metrics.lent_tokens.inc(tokens)
        self.metrics.lent_requests.inc(requests)

    def count_prefix_lookup(self, sequence: Sequence) -> None:
        """Count what an admitted sequence found in the prefix cache, where there is one."""
        if self.pool.prefix_cache:
            self.metrics.count_prefix_lookup(sequence.num_tokens, sequence.num_cached)

    @property
    def model_name(self) -> str:
        return served_name(self.config.model.path, self.config.model.served_name)

    def status(self) -> cluster_pb2.WorkerStatus:
        """What `tandem status` shows of this worker. Any thread."""
        return worker_status(self)

    async def _start_server(self, role: Role) -> str:
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        role.add_servicers(self._server)
        worker_pb2_grpc.add_WorkerServicer_to_server(WorkerService(self, self.loop), self._server)
        add_tracing(self._server, self.trace)
        host = self.config.worker.host
        port = self._server.add_insecure_port(f"{host}:0")
        await self._server.start()
        return f"{host}:{port}"

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self.config.worker.heartbeat_interval)
            self.loop.post(self._role.tick)
            self.loop.post(publish_gauges, self)


async def refuse_stale(
    runtime: WorkerRuntime, expected: int, context: grpc.aio.ServicerContext[Any, Any]
) -> None:
    """Abort a call that means another incarnation of this worker, and count it."""
    try:
        check_incarnation(runtime.name, expected, runtime.incarnation)
    except StaleError as error:
        runtime.metrics.stale.inc()
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, error.message)
