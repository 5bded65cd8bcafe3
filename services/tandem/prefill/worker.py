"""The prefill worker: legs in, chunks of KV and a first token out.

Which prompts share an iteration is the scheduler's decision; this worker computes what was granted
(`handoff`), and hands every group of layers to `transfer` as it is computed. Everything below
`PrefillWorker.start` runs in the engine thread.
"""

from __future__ import annotations

import time
from dataclasses import replace

import grpc.aio
import structlog

from tandem.core.config import TandemConfig
from tandem.core.request import PositionLogprobs, SampledToken
from tandem.core.sequence import IterationPlan, ScheduledChunk, Sequence
from tandem.engine.engine import LayerGroup
from tandem.prefill.handoff import Handoff
from tandem.prefill.legs import PrefillLeg
from tandem.prefill.sessions import PrefillService
from tandem.router.lending import PromptWork, load_of
from tandem.scheduler.prompt_room import PromptRoom
from tandem.v1 import worker_pb2, worker_pb2_grpc
from tandem.wire import position_logprobs_to_proto
from tandem.worker.load import load_to_proto
from tandem.worker.ranks import RankAddress
from tandem.worker.runtime import Progress, WorkerEndpoint, WorkerRuntime
from tandem.worker.transfers import LegTransfers

log = structlog.get_logger(__name__)


class PrefillWorker:
    """One prefill worker. `start` blocks until it serves, `stop` until it has ended."""

    def __init__(
        self, name: str, config: TandemConfig, device: str = "cpu", progress: Progress | None = None
    ) -> None:
        self._runtime = WorkerRuntime(name, "prefill", config, device, progress)

    @property
    def rank_address(self) -> RankAddress | None:
        """Where the worker's other ranks join; None if it has only one."""
        return self._runtime.rank_address

    def start(self) -> WorkerEndpoint:
        """Load, warm up and serve. Raises `ModelLoadError`."""
        self._runtime.load()
        if self._runtime.config.lending.mode == "measured":
            objective = self._runtime.config.scheduler.itl_objective
            self._runtime.scheduler.prompt_room = PromptRoom(objective, heeds_joining=False)
        self._transfers = LegTransfers(self._runtime)
        self._handoff = Handoff(self._runtime, self._transfers)
        return self._runtime.serve(self)

    def stop(self) -> None:
        """Drop what is in flight and end."""
        self._runtime.stop()

    def add_servicers(self, server: grpc.aio.Server) -> None:
        service = PrefillService(self._runtime, self._handoff)
        worker_pb2_grpc.add_PrefillServicer_to_server(service, server)

    # -- the loop

    def step(self) -> bool:
        """Offer, schedule, run. Returns whether anything changed."""
        handoff, scheduler = self._handoff, self._runtime.scheduler
        handoff.offer()
        plan = scheduler.schedule(time.monotonic())
        self._runtime.start_copies()
        for sequence in plan.admitted:
            if not scheduler.is_restoring(sequence):
                handoff.start(handoff.leg_of(sequence))
        for sequence in plan.preempted:
            handoff.fail(handoff.leg_of(sequence), "out of KV blocks")
        if plan.chunks:
            self._runtime.iterate(plan, lambda: self._run(plan))
            if not handoff.has_legs:
                self._report_load()  # idle from here on: somebody may have a prompt to spare
        return bool(plan.chunks or plan.admitted or plan.preempted)

    def restored(self, sequence: Sequence) -> None:
        """What host memory had of a prompt is in its blocks: start on the rest."""
        self._handoff.start(self._handoff.leg_of(sequence))

    def tick(self) -> None:
        """Say how loaded it is; streams and links have deadlines of their own."""
        self._report_load()

    def drop_everything(self) -> None:
        """Forget every leg and stream."""
        self._handoff.drop_everything()

    def _report_load(self) -> None:
        """Tell every decode worker what it needs to decide where its prompts are computed."""
        if self._runtime.config.lending.mode != "measured":
            return
        queued = self._handoff.queued_work()
        tokens = sum(work.tokens for work in queued.values())
        attended = sum(work.attended for work in queued.values())
        load = load_of(self._runtime.scheduler, PromptWork())
        is_measured = self._runtime.scheduler.costs.trusted
        for peer, own in queued.items():
            others = PromptWork(tokens - own.tokens, attended - own.attended)
            message = load_to_proto(replace(load, queued=others), is_measured=is_measured)
            peer.send(worker_pb2.PrefillToDecode(load=message))

    # -- an iteration

    def _run(self, plan: IterationPlan) -> None:
        runtime, handoff = self._runtime, self._handoff
        legs = [(handoff.leg_of(chunk.sequence), chunk) for chunk in plan.chunks]

        def on_layers(group: LayerGroup) -> None:
            for leg, chunk in legs:
                if leg.phase != "keeping":
                    start = max(chunk.start, leg.held_tokens)
                    self._transfers.send(leg, leg.chunks, (group,), start, chunk.end)

        try:
            output = runtime.engine.run(plan, on_layers)
        except Exception as error:
            log.exception("forward pass failed", worker=runtime.name, sequences=len(plan.chunks))
            for leg, _ in legs:
                handoff.fail(leg, f"{runtime.name}: forward pass failed: {error}")
            return
        runtime.scheduler.advance(plan)
        for leg, chunk in legs:
            runtime.count_tokens("decode" if chunk.length == 1 else "prefill", chunk.length)
            self._computed(leg, chunk, output.prompt_logprobs.get(chunk.sequence, []))
        for sequence, sampled in output.tokens.items():
            self._sampled(handoff.leg_of(sequence), sampled)

    def _computed(
        self, leg: PrefillLeg, chunk: ScheduledChunk, logprobs: list[PositionLogprobs]
    ) -> None:
        if leg.phase == "keeping" and chunk.start >= len(leg.sequence.request.token_ids):
            leg.chunks += 1
            return  # a decode step: its token says it all
        message = worker_pb2.ChunkComputed(
            leg_id=leg.leg_id,
            chunk=leg.chunks,
            start=chunk.start,
            num_tokens=chunk.length,
            prompt_logprobs=map(position_logprobs_to_proto, logprobs),
        )
        leg.chunks += 1
        leg.peer.send(worker_pb2.PrefillToDecode(chunk=message))

    def _sampled(self, leg: PrefillLeg, sampled: SampledToken) -> None:
        if leg.phase != "keeping":
            self._finish(leg, sampled)
        elif self._handoff.kept.sampled(leg, sampled):
            self._handoff.forget(leg, "finished")

    def _finish(self, leg: PrefillLeg, sampled: SampledToken) -> None:
        """The last chunk is computed: the first token goes with it and the leg is over here."""
        done = worker_pb2.PrefillDone(
            leg_id=leg.leg_id,
            token_id=sampled.token_id,
            prefill_seconds=time.monotonic() - leg.started_at,
        )
        if sampled.logprobs is not None:
            done.logprobs.CopyFrom(position_logprobs_to_proto(sampled.logprobs))
        leg.peer.send(worker_pb2.PrefillToDecode(done=done))
        leg.peer.transfer.finish_sends(leg.leg_id)
        self._handoff.forget(leg, "finished")
        self._runtime.metrics.observe_stage("prefill", done.prefill_seconds)
