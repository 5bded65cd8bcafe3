"""Prompts of decode workers, seen from the prefill worker: legs up to their start, and their end.

Takes legs, offers them in order, and starts what is granted with what either side holds already;
computing the rest is the business of `worker`. Runs in the engine thread only. Invariant: a leg
ends here exactly once, in `forget`; what its transfer still reads stays held.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Mapping

import structlog

from tandem.core.errors import OverloadedError, TandemError
from tandem.core.sequence import Sequence
from tandem.prefill.kept import KeptRequests
from tandem.prefill.legs import PrefillLeg
from tandem.prefill.sessions import DecodePeer
from tandem.router.lending import PromptWork
from tandem.v1 import worker_pb2
from tandem.wire import request_from_prefill
from tandem.worker.landing import LandingProgress
from tandem.worker.runtime import WorkerRuntime
from tandem.worker.transfers import LandedPiece, LegTransfers

log = structlog.get_logger(__name__)

_ITERATIONS_OFFERED_AHEAD = 2
"""Legs are offered until their tokens fill this many iterations, so that grants arrive in time
without reserving blocks on decode workers for prompts whose turn is far off."""

LegKey = tuple[DecodePeer, int]


class Handoff:
    """Every leg of this worker and the decode workers that they are for."""

    def __init__(self, runtime: WorkerRuntime, transfers: LegTransfers) -> None:
        self._runtime = runtime
        self._peers: set[DecodePeer] = set()
        self._legs: dict[LegKey, PrefillLeg] = {}
        self._by_sequence: dict[Sequence, PrefillLeg] = {}
        self._arrivals = itertools.count()
        self._transfers = transfers
        self.kept = KeptRequests(runtime, transfers, self)

    @property
    def peers(self) -> Collection[DecodePeer]:
        """The decode workers that are connected."""
        return self._peers

    @property
    def has_legs(self) -> bool:
        return bool(self._legs)

    def leg_of(self, sequence: Sequence) -> PrefillLeg:
        """Return the leg that a sequence of the scheduler's is for."""
        return self._by_sequence[sequence]

    def queued_work(self) -> Mapping[DecodePeer, PromptWork]:
        """Return what is left to compute for each decode worker."""
        work = {peer: PromptWork() for peer in self._peers}
        for leg in self._legs.values():
            start = max(leg.held_tokens, leg.sequence.num_computed)
            work[leg.peer] = work[leg.peer].plus(start, leg.sequence.num_tokens)
        return work

    def offer(self) -> None:
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

    def drop_everything(self) -> None:
        """Forget every leg and stream."""
        for leg in list(self._legs.values()):
            self._drop(leg)
        for peer in self._peers:
            peer.close()

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
            peer.fail_leg(message.leg_id, error.message)
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
            self.kept.granted(leg, message)
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
        peer.cut_leg(leg.leg_id, max(leg.held_tokens, computed))
        peer.transfer.finish_sends(leg.leg_id)
        peer.transfer.cancel_receives(leg.leg_id)
        self.forget(leg, "cut")

    # -- what transfers say

    def piece_landed(self, peer: DecodePeer, piece: LandedPiece) -> None:
        """KV that the decode worker already had has come; compute starts once it is complete."""
        leg = self._legs.get((peer, piece.leg_id))
        if leg is None or leg.fetched is None or leg.phase != "fetching":
            return
        try:
            leg.fetched.add(piece.first_layer, piece.num_layers, piece.start, piece.num_tokens)
        except ValueError as error:
            self.fail(leg, str(error))
            return
        if leg.fetched.contiguous >= leg.held_tokens:
            self._runtime.scheduler.landed(leg.sequence, leg.held_tokens)
            peer.transfer.finish_receives(leg.leg_id)
            self._compute(leg)

    def receives_closed(self, peer: DecodePeer, leg_id: int) -> None:
        self._transfers.closed(peer, leg_id, "in")

    def sends_closed(self, peer: DecodePeer, leg_id: int, error: str | None) -> None:
        """Every piece was acknowledged or never will be: the blocks may go."""
        self._transfers.closed(peer, leg_id, "out")
        if error:
            log.warning("KV not delivered", worker=self._runtime.name, peer=peer.name, reason=error)
            peer.fail_leg(leg_id, error)
            leg = self._legs.get((peer, leg_id))
            if leg is not None:
                self._drop(leg)

    def link_failed(self, peer: DecodePeer, leg_ids: tuple[int, ...], reason: str) -> None:
        """A link could not be rebuilt: its legs fail, the peer stays."""
        for leg_id in leg_ids:
            leg = self._legs.get((peer, leg_id))
            if leg is not None:
                self.fail(leg, reason)

    # -- what the worker says

    def start(self, leg: PrefillLeg) -> None:
        """Blocks are reserved: fetch what the decode worker has, send what is cached here."""
        sequence, runtime = leg.sequence, self._runtime
        cached, held = sequence.num_computed, leg.held_tokens
        leg.started_at = time.monotonic()
        runtime.trace.stage(sequence.request.request_id, "started", leg.started_at)
        runtime.metrics.observe_stage("queue", leg.started_at - leg.received_at)
        runtime.count_prefix_lookup(sequence)
        started = worker_pb2.PrefillStarted(
            leg_id=leg.leg_id, cached_tokens=cached, fetch_start=cached, fetch_end=max(cached, held)
        )
        leg.peer.send(worker_pb2.PrefillToDecode(started=started))
        if leg.phase == "keeping":
            if sequence.phase == "receiving":  # its prefix came back from host memory
                runtime.scheduler.fall_back(sequence)
            return
        self._transfers.open_sends(leg)
        if cached < held:
            leg.phase = "fetching"
            leg.fetched = LandingProgress(runtime.engine.spec.num_layers, cached)
            self._transfers.receive(leg, cached, held)
            return
        self._transfers.send_computed(leg, leg.chunks, held, cached)
        if sequence.phase == "receiving":
            self._compute(leg)
        else:
            leg.phase = "computing"

    def fail(self, leg: PrefillLeg, reason: str) -> None:
        """End a leg before its time, and say why."""
        leg.peer.fail_leg(leg.leg_id, reason)
        self._drop(leg, "failed")

    def forget(self, leg: PrefillLeg, outcome: str) -> None:
        """End a leg here; what its transfer still reads stays held."""
        self._runtime.scheduler.finish(leg.sequence, None)
        del self._legs[leg.peer, leg.leg_id]
        del self._by_sequence[leg.sequence]
        self._runtime.metrics.count_request(outcome)

    # -- steps of a leg

    def _granted(self, leg: PrefillLeg, held_tokens: int) -> None:
        leg.phase = "granted"
        leg.held_tokens = held_tokens
        # With tokens held elsewhere, compute starts only after the prefix is in place here.
        leg.sequence.remote = held_tokens > 0
        self._enqueue(leg)

    def _keep(self, leg: PrefillLeg) -> None:
        leg.phase = "keeping"
        self._runtime.count_lent(0, requests=1)
        self._enqueue(leg)

    def _enqueue(self, leg: PrefillLeg) -> None:
        """Let it wait for blocks; a full queue is its end."""
        try:
            self._runtime.scheduler.add(leg.sequence)
        except OverloadedError as error:
            self.fail(leg, error.message)

    def _compute(self, leg: PrefillLeg) -> None:
        leg.phase = "computing"
        self._runtime.scheduler.fall_back(leg.sequence)

    def _drop(self, leg: PrefillLeg, outcome: str = "cancelled") -> None:
        leg.peer.transfer.cancel_sends(leg.leg_id)
        leg.peer.transfer.cancel_receives(leg.leg_id)
        self.forget(leg, outcome)
