"""What a granted leg brings: KV, prompt logprobs and a token, until its sequence goes on here.

Engine thread only. Invariant: a sequence joins the running batch when the first token and the KV of
every token in every layer are here, neither sooner nor without the other; of a leg that was cut,
when everything up to the cut has landed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from tandem.core.request import PositionLogprobs, SampledToken
from tandem.decode.active import ActiveRequest, Leg
from tandem.v1 import worker_pb2
from tandem.wire import position_logprobs_from_proto
from tandem.worker.runtime import WorkerRuntime
from tandem.worker.transfers import LandedPiece


class LegOwner(Protocol):
    """How a leg ends."""

    def end(self, active: ActiveRequest, leg: Leg, *, early: bool) -> None:
        """It has brought all that it was to bring."""

    def fail(self, active: ActiveRequest, leg: Leg, reason: str) -> None:
        """It cannot bring the rest."""


class Arrivals:
    """Applies what comes for a leg, and lets its sequence go on once it can."""

    def __init__(
        self,
        runtime: WorkerRuntime,
        legs: LegOwner,
        emit: Callable[[ActiveRequest, SampledToken], None],
    ) -> None:
        """`emit` passes on a token that the prefill worker sampled."""
        self._runtime = runtime
        self._legs = legs
        self._emit = emit

    def piece(self, active: ActiveRequest, leg: Leg, piece: LandedPiece) -> None:
        """KV of some tokens in some layers is in its blocks."""
        if leg.landing is None:
            return
        try:
            leg.landing.add(piece.first_layer, piece.num_layers, piece.start, piece.num_tokens)
        except ValueError as error:
            self._legs.fail(active, leg, str(error))
            return
        leg.transfer_seconds += piece.seconds
        leg.kv_bytes += piece.num_bytes
        self._runtime.metrics.kv_bytes.inc(piece.num_bytes)
        leg.last_piece_at = leg.last_event_at = time.monotonic()
        self._note_landed(active, leg)
        if leg.cut_at is not None:
            self._go_on_from_cut(active, leg)
        else:
            self._join(active, leg)

    def chunk(self, active: ActiveRequest, leg: Leg, chunk: worker_pb2.ChunkComputed) -> None:
        """The prefill worker has computed some tokens; these are their prompt logprobs."""
        leg.computed = chunk.start + chunk.num_tokens
        if not active.wants_prompt_logprobs:
            return
        active.add_prompt_logprobs(
            chunk.start, map(position_logprobs_from_proto, chunk.prompt_logprobs)
        )
        active.logprobs_covered = max(active.logprobs_covered, chunk.start + chunk.num_tokens)
        self._note_landed(active, leg)

    def first_token(self, active: ActiveRequest, leg: Leg, done: worker_pb2.PrefillDone) -> None:
        """The prompt is computed, and this is its first token: emit it without waiting for KV."""
        leg.first_token_at = time.monotonic()
        self._runtime.metrics.observe_stage("prefill", done.prefill_seconds)
        self._emit(active, SampledToken(done.token_id, _logprobs(done)))
        if active.leg is leg:
            self._join(active, leg)

    def kept_token(self, active: ActiveRequest, leg: Leg, kept: worker_pb2.KeptToken) -> None:
        """The prefill worker decodes this request: pass its token on."""
        due = active.sequence.num_tokens
        if kept.position != due:
            self._legs.fail(active, leg, f"token {kept.position} came where {due} was due")
            return
        self._emit(active, SampledToken(kept.token_id, _logprobs(kept)))

    def cut(self, active: ActiveRequest, leg: Leg, cut: worker_pb2.PrefillCut) -> None:
        """The prefill worker has stopped, and says where."""
        leg.cut_at = cut.num_tokens
        self._go_on_from_cut(active, leg)

    def _note_landed(self, active: ActiveRequest, leg: Leg) -> None:
        if leg.landing is None:
            return
        # The last token known is computed again in any case: its logits give the next one.
        landed = min(leg.landing.contiguous, active.sequence.num_tokens - 1)
        if active.wants_prompt_logprobs:
            # KV whose logprobs are still to come must be computed again if the peer is lost now.
            landed = min(landed, active.logprobs_covered)
        if landed > active.sequence.num_computed:
            self._runtime.scheduler.landed(active.sequence, landed)

    def _join(self, active: ActiveRequest, leg: Leg) -> None:
        """Join the running batch once the first token and all KV are here."""
        if leg.landing is None or leg.first_token_at is None:
            return
        if leg.landing.contiguous < leg.num_tokens:
            return
        runtime = self._runtime
        seconds = time.monotonic() - leg.granted_at
        runtime.scheduler.preemption.prefilled(leg.num_granted, seconds)
        runtime.trace.stage(active.request.request_id, "landed", leg.last_piece_at)
        exposed = max(0.0, leg.last_piece_at - leg.first_token_at)
        runtime.metrics.observe_stage("transfer", leg.transfer_seconds)
        runtime.metrics.observe_stage("transfer_exposed", exposed)
        active.handover = worker_pb2.HandoverInfo(
            transfer_seconds=leg.transfer_seconds,
            exposed_transfer_seconds=exposed,
            kv_bytes=leg.kv_bytes,
        )
        self._note_landed(active, leg)
        self._legs.end(active, leg, early=False)
        leg.peer.transfer.finish_receives(leg.leg_id)
        runtime.scheduler.join(active.sequence)
        runtime.trace.stage(active.request.request_id, "joined")

    def _go_on_from_cut(self, active: ActiveRequest, leg: Leg) -> None:
        """Compute the rest here once everything up to the cut has landed."""
        if leg.landing is None or leg.cut_at is None or leg.landing.contiguous < leg.cut_at:
            return
        self._note_landed(active, leg)
        self._legs.end(active, leg, early=True)
        leg.peer.transfer.finish_receives(leg.leg_id)
        leg.peer.transfer.cancel_sends(leg.leg_id)
        self._runtime.metrics.kept_tokens.inc(active.sequence.num_computed)
        self._runtime.scheduler.fall_back(active.sequence)


def _logprobs(message: worker_pb2.PrefillDone | worker_pb2.KeptToken) -> PositionLogprobs | None:
    return position_logprobs_from_proto(message.logprobs) if message.HasField("logprobs") else None
