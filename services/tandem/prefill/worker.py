"""The prefill worker: legs in, chunks of KV and a first token out.

Which prompts share an iteration is the scheduler's decision; this worker offers legs to decode
workers in order, computes what is granted, and hands every group of layers to `transfer` as it is
computed. Everything below `PrefillWorker.start` runs in the engine thread.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import grpc.aio
import structlog

from tandem.core.config import TandemConfig
from tandem.core.errors import OverloadedError, TandemError
from tandem.core.request import PositionLogprobs, SampledToken
from tandem.core.sequence import IterationPlan, ScheduledChunk, Sequence
from tandem.engine.engine import LayerGroup
from tandem.prefill.kept import KeptRequests
from tandem.prefill.legs import PrefillLeg
from tandem.prefill.sessions import DecodePeer, PrefillService
from tandem.router.lending import PromptWork, load_of
from tandem.scheduler.prompt_room import PromptRoom
from tandem.transfer import Piece
from tandem.v1 import worker_pb2, worker_pb2_grpc
from tandem.wire import position_logprobs_to_proto, request_from_prefill
from tandem.worker.landing import LandingProgress
from tandem.worker.load import load_to_proto
from tandem.worker.ranks import RankAddress
from tandem.worker.runtime import Progress, WorkerEndpoint, WorkerRuntime
from tandem.worker.transfers import LandedPiece, TransferHolds

log = structlog.get_logger(__name__)

_ITERATIONS_OFFERED_AHEAD = 2
"""Legs are offered until their tokens fill this many iterations, so that grants arrive in time
without reserving blocks on decode workers for prompts whose turn is far off."""

LegKey = tuple[DecodePeer, int]


class PrefillWorker:
    """One prefill worker. `start` blocks until it serves, `stop` until it has ended."""

    def __init__(
        self, name: str, config: TandemConfig, device: str = "cpu", progress: Progress | None = None
    ) -> None:
        self._runtime = WorkerRuntime(name, "prefill", config, device, progress)
        self._legs: dict[LegKey, PrefillLeg] = {}
        self._by_sequence: dict[Sequence, PrefillLeg] = {}
        self._peers: set[DecodePeer] = set()
        self._arrivals = itertools.count()

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
        self._holds = TransferHolds(self._runtime.pool)
        self._kept = KeptRequests(self._runtime, self._holds, self)
        return self._runtime.serve(self)

    def stop(self) -> None:
        """Drop what is in flight and end."""
        self._runtime.stop()

    def add_servicers(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_PrefillServicer_to_server(PrefillService(self._runtime, self), server)

    # -- what decode workers say

    def peer_opened(self, peer: DecodePeer) -> None:
        self._peers.add(peer)

    def peer_closed(self, peer: DecodePeer) -> None:
        """A decode worker is gone: nobody wants its prefills any more."""
        self._peers.discard(peer)
        for leg in [leg for leg in self._legs.values() if leg.peer is peer]:
            self._drop(leg)

    def prefill(self, peer: DecodePeer, message: worker_pb2.PrefillRequest) -> None:
        """Take a leg, or say why not."""
        try:
            request = request_from_prefill(message)
            self._runtime.scheduler.check_fits(request)
            limits = self._runtime.config.scheduler
            if len(self._legs) >= limits.max_running + limits.max_waiting:
                raise OverloadedError(f"{self._runtime.name}: {len(self._legs)} prompts are queued")
        except TandemError as error:
            self._runtime.metrics.count_request("refused")
            _fail_leg(peer, message.leg_id, error.message)
            return
        self._runtime.trace.stage(request.request_id, "queued")
        now = time.monotonic()
        sequence = Sequence(request, next(self._arrivals), arrived_at=now)
        leg = PrefillLeg(peer, message.leg_id, sequence, received_at=now)
        self._legs[peer, leg.leg_id] = leg
        self._by_sequence[sequence] = leg
        if message.HasField("grant"):
            self._granted(leg, message.grant.held_tokens)
        elif message.keep:
            self._keep(leg)

    def grant(self, peer: DecodePeer, message: worker_pb2.Grant) -> None:
        """The decode worker has reserved blocks for an offered leg."""
        leg = self._legs.get((peer, message.leg_id))
        if leg is not None and leg.phase == "keeping":
            self._kept.granted(leg, message)
        elif leg is not None and leg.phase == "offered":
            self._granted(leg, message.held_tokens)
        else:
            self._runtime.metrics.stale.inc()

    def keep(self, peer: DecodePeer, message: worker_pb2.KeepPrefill) -> None:
        """Decode an offered leg here until the decode worker has blocks."""
        leg = self._legs.get((peer, message.leg_id))
        if leg is not None and leg.phase == "offered":
            self._keep(leg)

    def cancel(self, peer: DecodePeer, message: worker_pb2.CancelPrefill) -> None:
        """Drop a leg; one that has ended already is no concern."""
        leg = self._legs.get((peer, message.leg_id))
        if leg is not None:
            self._drop(leg)

    def cut(self, peer: DecodePeer, message: worker_pb2.CutPrefill) -> None:
        """End a leg between two chunks: what is computed is sent, the decode worker does the rest.

        One that has ended already was faster than the message.
        """
        leg = self._legs.get((peer, message.leg_id))
        if leg is None:
            return
        computed = leg.sequence.num_computed if leg.phase == "computing" else 0
        cut = worker_pb2.PrefillCut(leg_id=leg.leg_id, num_tokens=max(leg.held_tokens, computed))
        peer.send(worker_pb2.PrefillToDecode(cut=cut))
        peer.transfer.finish_sends(leg.leg_id)
        peer.transfer.cancel_receives(leg.leg_id)
        self.forget(leg, "cut")

    # -- the loop

    def step(self) -> bool:
        """Offer, schedule, run. Returns whether anything changed."""
        self._offer()
        plan = self._runtime.scheduler.schedule(time.monotonic())
        self._runtime.prepare_blocks()
        for sequence in plan.admitted:
            if not self._runtime.scheduler.is_restoring(sequence):
                self._start(self._by_sequence[sequence])
        for sequence in plan.preempted:
            self._fail(self._by_sequence[sequence], "out of KV blocks")
        if plan.chunks:
            self._runtime.iterate(plan, lambda: self._run(plan))
            if not self._legs:
                self._report_load()  # idle from here on: somebody may have a prompt to spare
        return bool(plan.chunks or plan.admitted or plan.preempted)

    def tick(self) -> None:
        """Say how loaded it is; streams and links have deadlines of their own."""
        self._report_load()

    def drop_everything(self) -> None:
        """Forget every leg and stream."""
        for leg in list(self._legs.values()):
            self._drop(leg)
        for peer in self._peers:
            peer.close()

    def _report_load(self) -> None:
        """Tell every decode worker what it needs to decide where its prompts are computed."""
        if self._runtime.config.lending.mode != "measured":
            return
        queued: dict[DecodePeer, PromptWork] = {peer: PromptWork() for peer in self._peers}
        for leg in self._legs.values():
            start = max(leg.held_tokens, leg.sequence.num_computed)
            queued[leg.peer] = queued[leg.peer].plus(start, leg.sequence.num_tokens)
        tokens = sum(work.tokens for work in queued.values())
        attended = sum(work.attended for work in queued.values())
        load = load_of(self._runtime.scheduler, PromptWork())
        is_measured = self._runtime.scheduler.costs.trusted
        for peer, own in queued.items():
            others = PromptWork(tokens - own.tokens, attended - own.attended)
            message = load_to_proto(replace(load, queued=others), is_measured=is_measured)
            peer.send(worker_pb2.PrefillToDecode(load=message))

    # -- what transfers say

    def piece_landed(self, peer: DecodePeer, piece: LandedPiece) -> None:
        """KV that the decode worker already had has come; compute starts once it is complete."""
        leg = self._legs.get((peer, piece.leg_id))
        if leg is None or leg.fetched is None or leg.phase != "fetching":
            return
        try:
            leg.fetched.add(piece.first_layer, piece.num_layers, piece.start, piece.num_tokens)
        except ValueError as error:
            self._fail(leg, str(error))
            return
        if leg.fetched.contiguous >= leg.held_tokens:
            self._runtime.scheduler.landed(leg.sequence, leg.held_tokens)
            peer.transfer.finish_receives(leg.leg_id)
            self._compute(leg)

    def receives_closed(self, peer: DecodePeer, leg_id: int) -> None:
        self._holds.release(peer.name, leg_id, "in")

    def sends_closed(self, peer: DecodePeer, leg_id: int, error: str | None) -> None:
        """Every piece was acknowledged or never will be: the blocks may go."""
        self._holds.release(peer.name, leg_id, "out")
        if error:
            log.warning("KV not delivered", worker=self._runtime.name, peer=peer.name, reason=error)
            _fail_leg(peer, leg_id, error)
            leg = self._legs.get((peer, leg_id))
            if leg is not None:
                self._drop(leg)

    def link_failed(self, peer: DecodePeer, leg_ids: tuple[int, ...], reason: str) -> None:
        """A link could not be rebuilt: its legs fail, the peer stays."""
        for leg_id in leg_ids:
            leg = self._legs.get((peer, leg_id))
            if leg is not None:
                self._fail(leg, reason)

    # -- steps of a leg

    def _offer(self) -> None:
        """Offer each decode worker its next legs, enough to keep this worker busy."""
        policy = self._runtime.scheduler.policy
        limit = _ITERATIONS_OFFERED_AHEAD * self._runtime.config.scheduler.max_batch_tokens
        for peer in self._peers:
            legs = [leg for leg in self._legs.values() if leg.peer is peer]
            ahead = sum(
                leg.sequence.num_tokens for leg in legs if leg.phase in ("offered", "granted")
            )
            queued = [leg.sequence for leg in legs if leg.phase == "queued"]
            queued.sort(key=lambda sequence: sequence.order)
            for sequence in policy.line(queued, time.monotonic()):
                if ahead >= limit:
                    break
                leg = self._by_sequence[sequence]
                ahead += leg.sequence.num_tokens
                leg.phase = "offered"
                self._runtime.trace.stage(sequence.request.request_id, "offered")
                offer = worker_pb2.Offer(leg_id=leg.leg_id)
                peer.send(worker_pb2.PrefillToDecode(offer=offer))

    def _granted(self, leg: PrefillLeg, held_tokens: int) -> None:
        leg.phase = "granted"
        leg.held_tokens = held_tokens
        # With tokens held elsewhere, compute starts only after the prefix is in place here.
        leg.sequence.remote = held_tokens > 0
        try:
            self._runtime.scheduler.add(leg.sequence)
        except OverloadedError as error:
            self._fail(leg, error.message)

    def _keep(self, leg: PrefillLeg) -> None:
        leg.phase = "keeping"
        self._runtime.count_lent(0, requests=1)
        try:
            self._runtime.scheduler.add(leg.sequence)
        except OverloadedError as error:
            self._fail(leg, error.message)

    def _start(self, leg: PrefillLeg) -> None:
        """Blocks are reserved: fetch what the decode worker has, send what is cached here."""
        sequence, transfer = leg.sequence, leg.peer.transfer
        cached, held = sequence.num_computed, leg.held_tokens
        leg.started_at = time.monotonic()
        self._runtime.trace.stage(sequence.request.request_id, "started", leg.started_at)
        metrics = self._runtime.metrics
        metrics.observe_stage("queue", leg.started_at - leg.received_at)
        self._runtime.count_prefix_lookup(sequence)
        started = worker_pb2.PrefillStarted(
            leg_id=leg.leg_id, cached_tokens=cached, fetch_start=cached, fetch_end=max(cached, held)
        )
        leg.peer.send(worker_pb2.PrefillToDecode(started=started))
        if leg.phase == "keeping":
            if sequence.phase == "receiving":  # its prefix came back from host memory
                self._runtime.scheduler.fall_back(sequence)
            return
        self._holds.take(leg.peer.name, leg.leg_id, "out", sequence)
        transfer.open_sends(leg.leg_id)
        if cached < held:
            leg.phase = "fetching"
            leg.fetched = LandingProgress(self._runtime.engine.spec.num_layers, cached)
            self._holds.take(leg.peer.name, leg.leg_id, "in", sequence)
            slots = self._runtime.engine.storage.slots(sequence.block_table, cached, held)
            transfer.expect(leg.leg_id, cached, slots)
            return
        ready = self._runtime.engine.record_event()
        for first_layer, num_layers in self._runtime.engine.layer_groups:
            self.send_kv(leg, LayerGroup(first_layer, num_layers, ready), held, cached)
        if sequence.phase == "receiving":
            self._compute(leg)
        else:
            leg.phase = "computing"

    def restored(self, sequence: Sequence) -> None:
        """What host memory had of a prompt is in its blocks: start on the rest."""
        self._start(self._by_sequence[sequence])

    def _compute(self, leg: PrefillLeg) -> None:
        leg.phase = "computing"
        self._runtime.scheduler.fall_back(leg.sequence)

    def _run(self, plan: IterationPlan) -> None:
        runtime = self._runtime
        legs = [(self._by_sequence[chunk.sequence], chunk) for chunk in plan.chunks]

        def on_layers(group: LayerGroup) -> None:
            for leg, chunk in legs:
                if leg.phase != "keeping":
                    self.send_kv(leg, group, max(chunk.start, leg.held_tokens), chunk.end)

        try:
            output = runtime.engine.run(plan, on_layers)
        except Exception as error:
            log.exception("forward pass failed", worker=runtime.name, sequences=len(plan.chunks))
            for leg, _ in legs:
                self._fail(leg, f"{runtime.name}: forward pass failed: {error}")
            return
        runtime.scheduler.advance(plan)
        for chunk in plan.chunks:
            runtime.count_tokens("decode" if chunk.length == 1 else "prefill", chunk.length)
        for leg, chunk in legs:
            self._computed(leg, chunk, output.prompt_logprobs.get(chunk.sequence, []))
        for sequence, sampled in output.tokens.items():
            leg = self._by_sequence[sequence]
            if leg.phase != "keeping":
                self._finish(leg, sampled)
            elif self._kept.sampled(leg, sampled):
                self.forget(leg, "finished")

    def send_kv(self, leg: PrefillLeg, group: LayerGroup, start: int, end: int) -> None:
        """Hand KV of tokens [start, end) in one group of layers to the link."""
        if start >= end:
            return
        slots = self._runtime.engine.storage.slots(leg.sequence.block_table, start, end)
        piece = Piece(
            leg.leg_id, leg.chunks, group.first_layer, group.num_layers, start, slots, group.ready
        )
        leg.peer.transfer.send(piece)

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
        self.forget(leg, "finished")
        self._runtime.metrics.observe_stage("prefill", done.prefill_seconds)

    def _fail(self, leg: PrefillLeg, reason: str) -> None:
        _fail_leg(leg.peer, leg.leg_id, reason)
        self._drop(leg, "failed")

    def _drop(self, leg: PrefillLeg, outcome: str = "cancelled") -> None:
        leg.peer.transfer.cancel_sends(leg.leg_id)
        leg.peer.transfer.cancel_receives(leg.leg_id)
        self.forget(leg, outcome)

    def forget(self, leg: PrefillLeg, outcome: str) -> None:
        """End a leg here; what its transfer still reads stays held."""
        self._runtime.scheduler.finish(leg.sequence, None)
        del self._legs[leg.peer, leg.leg_id]
        del self._by_sequence[leg.sequence]
        self._runtime.metrics.count_request(outcome)


def _fail_leg(peer: DecodePeer, leg_id: int, reason: str) -> None:
    failed = worker_pb2.PrefillFailed(leg_id=leg_id, reason=reason)
    peer.send(worker_pb2.PrefillToDecode(failed=failed))
