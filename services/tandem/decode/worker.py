"""The decode worker: requests in, continuous batching, tokens out.

Owns every request inside the cluster from submission to its last token, and decides where its
prompt is prefilled. How KV gets here is `handoff`; which sequences run is the scheduler's decision.
Everything below `DecodeWorker.start` runs in the engine thread.
"""

from __future__ import annotations

import itertools
import time

import grpc.aio
import structlog

from tandem.core.config import TandemConfig
from tandem.core.errors import OverloadedError, StaleError, TandemError, UnavailableError
from tandem.core.request import FinishReason, SampledToken
from tandem.core.sequence import IterationPlan, Sequence
from tandem.core.stopping import finish_reason
from tandem.decode.active import ActiveRequest
from tandem.decode.handoff import Handoff
from tandem.decode.lending import Lender
from tandem.decode.outputs import token_output
from tandem.decode.sessions import DecodeService, GatewaySession
from tandem.engine import IterationOutput
from tandem.router.lending import local_prefill_limit, may_change_places
from tandem.scheduler.costs import work_of
from tandem.v1 import worker_pb2, worker_pb2_grpc
from tandem.wire import request_from_submit
from tandem.worker.pipeline import Pipeline
from tandem.worker.ranks import RankAddress
from tandem.worker.runtime import Progress, WorkerEndpoint, WorkerRuntime

log = structlog.get_logger(__name__)

Key = tuple[str, int]


class DecodeWorker:
    """One decode worker. `start` blocks until it serves, `stop` until it has ended."""

    def __init__(
        self, name: str, config: TandemConfig, device: str = "cpu", progress: Progress | None = None
    ) -> None:
        self._runtime = WorkerRuntime(name, "decode", config, device, progress)
        self._active: dict[Key, ActiveRequest] = {}
        self._by_sequence: dict[Sequence, ActiveRequest] = {}
        self._sessions: set[GatewaySession] = set()
        self._arrivals = itertools.count()

    @property
    def rank_address(self) -> RankAddress | None:
        """Where the worker's other ranks join; None if it has only one."""
        return self._runtime.rank_address

    def start(self) -> WorkerEndpoint:
        """Load, warm up and serve. Raises `ModelLoadError`."""
        self._runtime.load()
        self._handoff = Handoff(self._runtime, self)
        self._pipeline = Pipeline(self._runtime, self)
        self._lender = Lender(self._runtime, self._handoff, self)
        return self._runtime.serve(self)

    def stop(self) -> None:
        """Cancel what is in flight and end."""
        self._runtime.stop()

    def add_servicers(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_DecodeServicer_to_server(DecodeService(self._runtime, self), server)

    # -- what gateways say

    def session_opened(self, session: GatewaySession) -> None:
        self._sessions.add(session)

    def submit(self, session: GatewaySession, message: worker_pb2.Submit) -> None:
        """Take a request, or say why not."""
        try:
            active = self._accept(session, message)
        except TandemError as error:
            self._runtime.metrics.count_request("refused")
            session.fail(error, message.request_id, message.attempt)
            return
        self._runtime.trace.stage(message.request_id, "accepted")
        self._active[active.key] = active
        self._by_sequence[active.sequence] = active
        self._prefill(active)

    def cancel(self, session: GatewaySession, message: worker_pb2.Cancel) -> None:
        """Drop a request; one that has ended already is no concern."""
        active = self._active.get((message.request_id, message.attempt))
        if active is not None and active.session is session:
            self._end(active, "cancelled", None)

    def reassign(self, session: GatewaySession, message: worker_pb2.Reassign) -> None:
        """The answer to NeedPrefill: another prefill worker, or none."""
        active = self._active.get((message.request_id, message.attempt))
        if (
            active is None
            or active.session is not session
            or active.awaiting_reassign_since is None
        ):
            self._runtime.metrics.stale.inc()
            return
        active.awaiting_reassign_since = None
        active.target = message.prefill if message.HasField("prefill") else None
        self._prefill(active)

    def session_closed(self, session: GatewaySession) -> None:
        """A gateway is gone: so are its requests."""
        self._sessions.discard(session)
        for active in [a for a in self._active.values() if a.session is session]:
            self._end(active, "cancelled", None)

    # -- the loop

    def step(self) -> bool:
        """Schedule and launch an iteration, hand out the one before it. Returns whether anything
        changed."""
        self._lender.rebalance()
        self._flush()  # first tokens that prefill workers sampled need not wait for this iteration
        plan = self._runtime.scheduler.schedule(time.monotonic())
        for sequence in plan.preempted:
            self._preempted(self._by_sequence[sequence])
        for sequence in plan.admitted:
            self._admitted(self._by_sequence[sequence])
        self._runtime.start_copies()
        if self._runtime.scheduler.num_waiting:
            self._lender.keep_where_it_is()
        settled = self._pipeline.run(plan)
        if plan.chunks and may_change_places(work_of(plan.chunks), self._runtime.scheduler):
            self._lender.news = True
        self._flush()
        return bool(settled or plan.chunks or plan.preempted or plan.admitted)

    def tick(self) -> None:
        """Apply the deadlines of the queue, of a prefill elsewhere and of a reassignment."""
        now, config = time.monotonic(), self._runtime.config.worker
        self._handoff.tick(now)
        host_value = self._runtime.scheduler.preemption.host_value
        for session in self._sessions:
            session.report_prefixes(self._runtime.journal, host_value)
        for active in list(self._active.values()):
            since = active.awaiting_reassign_since
            if since is not None and now - since > config.reassign_timeout:
                log.warning("no reassignment came, prefilling here", request=active.key[0])
                active.awaiting_reassign_since = active.target = None
                self._prefill(active)
            elif active.started_at is None and now - active.submitted_at > config.queue_timeout:
                waited = f"{now - active.submitted_at:.0f} s"
                self._refuse(active, OverloadedError(f"waited {waited} for {self._runtime.name}"))

    def drop_everything(self) -> None:
        """Forget every request, gateway and peer."""
        for active in list(self._active.values()):
            self._end(active, "dropped", None)
        for session in self._sessions:
            session.close()
        self._handoff.close()

    # -- what the hand-over says

    def news(self) -> None:
        self._lender.news = True

    def enqueue(self, active: ActiveRequest) -> None:
        """Let a request wait for blocks; a full queue is its end here."""
        try:
            self._runtime.scheduler.add(active.sequence)
        except TandemError as error:
            self._refuse(active, error)

    def token(self, active: ActiveRequest, sampled: SampledToken) -> None:
        """Append a sampled token, emit it, and finish the request if it was the last."""
        sequence, spec = active.sequence, self._runtime.engine.spec
        if active.first_token_at is None:
            active.first_token_at = time.monotonic()
            self._runtime.trace.stage(active.request.request_id, "first_token")
        self._runtime.scheduler.append(sequence, sampled.token_id)
        reason = finish_reason(sequence, spec.eos_token_ids, spec.max_model_len)
        output = token_output(active, sampled, reason)
        active.handover = None
        if output.HasField("first"):
            self._runtime.metrics.observe_stage("queue", output.first.queue_seconds)
        active.session.emit(output)
        if reason is not None:
            self._end(active, "finished", reason)

    def prefill_lost(self, active: ActiveRequest, worker: str, reason: str) -> None:
        """Ask the gateway for another prefill worker; what has landed stays."""
        active.awaiting_reassign_since = time.monotonic()
        active.session.need_prefill(active.request, worker, reason)

    def _flush(self) -> None:
        for session in self._sessions:
            session.flush(self._runtime.iterations)

    # -- steps of a request

    def _accept(self, session: GatewaySession, message: worker_pb2.Submit) -> ActiveRequest:
        request = request_from_submit(message)
        if (request.request_id, request.attempt) in self._active:
            raise StaleError(
                f"request {request.request_id} attempt {request.attempt} is here already"
            )
        self._runtime.scheduler.check_fits(request)
        limits = self._runtime.config.scheduler
        if len(self._active) >= limits.max_running + limits.max_waiting:
            raise OverloadedError(f"{self._runtime.name}: {len(self._active)} requests are queued")
        target = message.prefill if message.HasField("prefill") else None
        now = time.monotonic()
        sequence = Sequence(request, next(self._arrivals), arrived_at=now)
        return ActiveRequest(sequence, session, target, submitted_at=now)

    def _prefill(self, active: ActiveRequest) -> None:
        """Send a sequence where the KV of its tokens is to be made."""
        sequence = active.sequence
        if self._runtime.scheduler.is_restoring(sequence):
            return  # `restored` asks again
        have = sequence.num_computed or self._runtime.scheduler.peek_cached(sequence)
        is_here = active.target is None or not self._is_worth_remote(sequence.num_tokens - have)
        if self._lender.is_sooner_elsewhere(active, have, is_here=is_here):
            is_here = not is_here
            active.is_lent = is_here
            self._runtime.count_lent(0, requests=int(is_here))
        if sequence.block_table and not self._runtime.scheduler.has_room(sequence):
            is_here = True  # KV of all its tokens could not come back
        if active.target is not None and not is_here:
            self._handoff.begin(active, active.target)
        else:
            self.compute_here(active)

    def request_of(self, sequence: Sequence) -> ActiveRequest:
        return self._by_sequence[sequence]

    def compute_here(self, active: ActiveRequest) -> None:
        """Let a sequence that has no leg compute what it lacks itself."""
        sequence = active.sequence
        active.prefill_worker = ""
        sequence.remote = False
        if self._runtime.scheduler.is_restoring(sequence):
            return  # `restored` lets it go on
        if sequence.phase == "receiving":
            self._runtime.scheduler.fall_back(sequence)
        else:
            self.enqueue(active)

    def _is_worth_remote(self, missing_tokens: int) -> bool:
        """Whether a prompt goes to its prefill worker by default."""
        config = self._runtime.config
        return config.worker.disaggregated and missing_tokens > local_prefill_limit(config)

    def _admitted(self, active: ActiveRequest) -> None:
        sequence = active.sequence
        self._runtime.count_prefix_lookup(sequence)
        if sequence.remote and not self._runtime.scheduler.is_restoring(sequence):
            self._handoff.admitted(active)
        if active.leg is None:  # prefilled here
            active.started_at = active.started_at or time.monotonic()
            if active.cached_tokens is None:
                active.cached_tokens = min(sequence.num_cached, active.request.prompt_len)

    def restored(self, sequence: Sequence) -> None:
        """What host memory had of a sequence is in its blocks."""
        active = self._by_sequence[sequence]
        if not sequence.remote:
            self._runtime.scheduler.fall_back(sequence)
        elif active.leg is not None:
            self._handoff.admitted(active)
        elif active.awaiting_reassign_since is None:
            self._prefill(active)

    def _preempted(self, active: ActiveRequest) -> None:
        self._runtime.trace.stage(active.request.request_id, "preempted")
        log.info("preempted", request=active.request.request_id, tokens=active.sequence.num_tokens)
        self._prefill(active)

    # -- what the pipeline says

    def computed(self, plan: IterationPlan, output: IterationOutput) -> None:
        """Hand out what an iteration drew. A request that ended while it was under way gets none of
        it."""
        decodes = sum(chunk.length == 1 for chunk in plan.chunks)
        self._runtime.count_tokens("decode", decodes)
        self._runtime.count_tokens("prefill", plan.num_tokens - decodes)
        for chunk in plan.chunks if plan.num_tokens > decodes else ():
            active = self._by_sequence.get(chunk.sequence)
            if chunk.length > 1 and active is not None and active.is_lent:
                self._runtime.count_lent(chunk.length)
        if output.prompt_logprobs:
            for chunk in plan.chunks:
                active = self._by_sequence.get(chunk.sequence)
                logprobs = output.prompt_logprobs.get(chunk.sequence)
                if active is not None and logprobs:
                    active.add_prompt_logprobs(chunk.start, logprobs)
        for sequence, sampled in output.tokens.items():
            active = self._by_sequence.get(sequence)
            if active is not None:
                self.token(active, sampled)

    def failed(self, plan: IterationPlan, error: Exception) -> None:
        """End the requests of an iteration that could not be computed."""
        cause = UnavailableError(f"{self._runtime.name}: forward pass failed: {error}")
        for chunk in plan.chunks:
            active = self._by_sequence.get(chunk.sequence)
            if active is not None:
                self._refuse(active, cause)

    def _refuse(self, active: ActiveRequest, error: TandemError) -> None:
        self._end(active, "failed", None)
        active.session.fail(error, *active.key)

    def _end(self, active: ActiveRequest, outcome: str, reason: FinishReason | None) -> None:
        """Let go of everything that the request holds."""
        self._handoff.abandon(active)
        self._runtime.scheduler.finish(active.sequence, reason)
        del self._active[active.key]
        del self._by_sequence[active.sequence]
        self._lender.news |= self._handoff.has_legs  # what it took is free for prompts
        self._runtime.metrics.count_request(outcome)
        self._runtime.trace.stage(active.request.request_id, "finished")
        if active.first_token_at is not None:
            self._runtime.metrics.observe_stage("decode", time.monotonic() - active.first_token_at)
