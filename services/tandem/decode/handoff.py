"""Prefill elsewhere, seen from the decode worker: legs from the first message to the last byte.

What they bring is for `arrivals`. Runs in the engine thread only. Keeps three promises: blocks are
reserved late (when the prefill worker offers to start), they are never freed under a transfer (the
leg's own hold ends with `receives_closed` / `sends_closed`), and what has landed is kept when the
rest must come from elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from typing import Protocol

import structlog

from tandem.core.request import SampledToken
from tandem.decode.active import ActiveRequest, Leg
from tandem.decode.arrivals import Arrivals
from tandem.decode.peers import PrefillPeer
from tandem.router.lending import local_prefill_limit
from tandem.v1 import worker_pb2
from tandem.wire import request_to_prefill
from tandem.worker.landing import LandingProgress
from tandem.worker.runtime import WorkerRuntime
from tandem.worker.transfers import LandedPiece, LegTransfers

log = structlog.get_logger(__name__)


class HandoffOwner(Protocol):
    """What the hand-over tells the worker about a request. Engine thread."""

    def news(self) -> None:
        """A leg is over, or a prefill worker has reported: prompts may be better off elsewhere."""

    def enqueue(self, active: ActiveRequest) -> None:
        """Put its sequence into the scheduler's queue, where it waits for blocks."""

    def token(self, active: ActiveRequest, sampled: SampledToken) -> None:
        """The prefill worker sampled the first token of this leg."""

    def prefill_lost(self, active: ActiveRequest, worker: str, reason: str) -> None:
        """The leg is over before its time; `active.leg` is None again."""


class Handoff:
    """Every leg of this worker and the peers that they run on."""

    def __init__(self, runtime: WorkerRuntime, owner: HandoffOwner) -> None:
        self._runtime = runtime
        self._owner = owner
        self._peers: dict[str, PrefillPeer] = {}
        self._legs: dict[int, ActiveRequest] = {}
        self._transfers = LegTransfers(runtime)
        self._arrivals = Arrivals(runtime, self, owner.token)
        self._next_leg_id = 1

    @property
    def peers(self) -> Collection[PrefillPeer]:
        """The prefill workers in use."""
        return self._peers.values()

    @property
    def has_legs(self) -> bool:
        return bool(self._legs)

    def movable_legs(self) -> Iterator[tuple[ActiveRequest, Leg]]:
        """Legs whose prompt is not done, in the order in which they were begun."""
        for active in self._legs.values():
            leg = active.leg
            if leg is None or leg.phase == "cutting" or leg.was_kept:
                continue
            if leg.first_token_at is None:
                yield active, leg

    # -- what the worker asks for

    def begin(self, active: ActiveRequest, target: worker_pb2.PrefillTarget) -> None:
        """Start a leg on `target`. A sequence that holds blocks keeps them and what is in them."""
        peer = self._peer(target)
        sequence = active.sequence
        idle = not self.legs_on(peer)
        leg = Leg(self._next_leg_id, peer, sequence, sequence.num_tokens)
        self._next_leg_id += 1
        self._legs[leg.leg_id] = active
        self._runtime.trace.leg(active.request.request_id, leg.leg_id)
        active.leg, active.prefill_worker = leg, peer.name
        sequence.remote = True
        if sequence.phase == "receiving":
            leg.phase = "offered"
            self._grant(active, leg)
        elif idle:
            # The peer would offer at once: reserve now and let the request carry its grant.
            leg.phase = "offered"
            self._owner.enqueue(active)
        else:
            self._ask(active, leg, held_tokens=None)

    def admitted(self, active: ActiveRequest) -> None:
        """The scheduler reserved blocks for a remote sequence."""
        leg, sequence = active.leg, active.sequence
        if leg is None:
            raise ValueError(f"{active.key}: admitted as remote without a leg")
        short = local_prefill_limit(self._runtime.config)
        if sequence.num_uncomputed <= short and not leg.was_kept:
            self.abandon(active)
            active.prefill_worker = ""
            self._runtime.scheduler.fall_back(sequence)
            return
        self._grant(active, leg)

    def abandon(self, active: ActiveRequest) -> None:
        """End the leg of a request, if it has one: cancelled, finished, or better done here."""
        leg = active.leg
        if leg is None:
            return
        self.end(active, leg, early=True)
        leg.peer.transfer.cancel_receives(leg.leg_id)
        leg.peer.transfer.cancel_sends(leg.leg_id)
        if leg.was_asked:
            cancel = worker_pb2.CancelPrefill(leg_id=leg.leg_id)
            leg.peer.send(worker_pb2.DecodeToPrefill(cancel=cancel))

    def legs_on(self, peer: PrefillPeer) -> list[Leg]:
        """The legs that run on a peer, or wait for it."""
        legs = (active.leg for active in self._legs.values())
        return [leg for leg in legs if leg is not None and leg.peer is peer]

    def keep(self, active: ActiveRequest, leg: Leg) -> None:
        """Let the prefill worker decode an offered leg itself until blocks are reserved here."""
        leg.phase, leg.was_kept = "kept", True
        if leg.was_asked:
            keep = worker_pb2.KeepPrefill(leg_id=leg.leg_id)
            leg.peer.send(worker_pb2.DecodeToPrefill(keep=keep))
        else:
            self._ask(active, leg, held_tokens=None, keep=True)

    def cut(self, active: ActiveRequest) -> bool:
        """End a leg early so that this worker computes the rest; what is computed is kept.

        True: it is granted, and goes on here once what the peer has computed is in its blocks.
        False: nothing was computed, the leg is over, and the sequence may be queued anew.
        """
        leg = active.leg
        if leg is None or leg.phase != "granted":
            self.abandon(active)
            self._runtime.scheduler.withdraw(active.sequence)
            return False
        leg.phase = "cutting"
        cut = worker_pb2.CutPrefill(leg_id=leg.leg_id)
        leg.peer.send(worker_pb2.DecodeToPrefill(cut=cut))
        return True

    def tick(self, now: float) -> None:
        """Fail legs that were granted and of which nothing has been heard for too long."""
        timeout = self._runtime.config.worker.progress_timeout
        for active in list(self._legs.values()):
            leg = active.leg
            if leg and leg.phase in ("granted", "cutting") and now - leg.last_event_at > timeout:
                self.fail(active, leg, f"no chunk and no KV for {timeout:g} s")

    def close(self) -> None:
        """End every stream to a peer."""
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()

    # -- what peers say

    def peer_message(self, peer: PrefillPeer, message: worker_pb2.PrefillToDecode) -> None:
        """Apply a message of a prefill worker; one about a leg that is over is stale."""
        kind = message.WhichOneof("kind")
        peer.progress_at = time.monotonic()
        if kind == "load":
            peer.load = message.load
            self._owner.news()
            return
        body = getattr(message, kind) if kind else None
        active = self._legs.get(body.leg_id) if body is not None else None
        if active is None or active.leg is None or active.leg.peer is not peer:
            self._runtime.metrics.stale.inc()
            return
        leg = active.leg
        leg.last_event_at = time.monotonic()
        match kind:
            case "offer":
                self._offered(active, leg)
            case "started":
                self._started(active, leg, message.started)
            case "chunk":
                self._arrivals.chunk(active, leg, message.chunk)
            case "done":
                self._arrivals.first_token(active, leg, message.done)
            case "kept":
                self._arrivals.kept_token(active, leg, message.kept)
            case "cut":
                self._arrivals.cut(active, leg, message.cut)
            case "failed":
                self.fail(active, leg, message.failed.reason)

    def peer_lost(self, peer: PrefillPeer, reason: str) -> None:
        """Fail every leg that runs on a peer whose stream is gone."""
        if self._peers.get(peer.name) is peer:
            del self._peers[peer.name]
        for active in list(self._legs.values()):
            if active.leg is not None and active.leg.peer is peer:
                self.fail(active, active.leg, reason)

    # -- what transfers say

    def piece_landed(self, peer: PrefillPeer, piece: LandedPiece) -> None:
        """KV of some tokens in some layers is in its blocks."""
        active = self._legs.get(piece.leg_id)
        if active is not None and active.leg is not None:
            self._arrivals.piece(active, active.leg, piece)

    def receives_closed(self, peer: PrefillPeer, leg_id: int) -> None:
        """No scatter touches the leg's blocks any more."""
        self._transfers.closed(peer, leg_id, "in")

    def sends_closed(self, peer: PrefillPeer, leg_id: int, error: str | None) -> None:
        """KV that the prefill worker fetched has arrived there, or never will."""
        self._transfers.closed(peer, leg_id, "out")
        active = self._legs.get(leg_id)
        if error and active is not None and active.leg is not None:
            self.fail(active, active.leg, error)

    def link_failed(self, peer: PrefillPeer, leg_ids: tuple[int, ...], reason: str) -> None:
        """A link could not be rebuilt: its legs fail, the peer stays."""
        for leg_id in leg_ids:
            active = self._legs.get(leg_id)
            if active is not None and active.leg is not None:
                self.fail(active, active.leg, reason)

    # -- how a leg ends

    def fail(self, active: ActiveRequest, leg: Leg, reason: str) -> None:
        """A leg cannot bring the rest; what has landed stays."""
        self.abandon(active)
        if leg.phase != "asked" and active.sequence.phase == "waiting":
            self._runtime.scheduler.withdraw(active.sequence)
        self._runtime.metrics.count_recovery("prefill_lost")
        self._runtime.metrics.kept_tokens.inc(active.sequence.num_computed)
        log.warning(
            "prefill leg lost", worker=self._runtime.name, request=active.request.request_id,
            peer=leg.peer.name, reason=reason, kept_tokens=active.sequence.num_computed,
        )  # fmt: skip
        self._owner.prefill_lost(active, leg.peer.name, reason)

    def end(self, active: ActiveRequest, leg: Leg, *, early: bool) -> None:
        """A leg is over here; what its transfers touch stays held until they have closed.

        `early`: its prompt is not computed, so others may now be computed sooner elsewhere.
        """
        del self._legs[leg.leg_id]
        active.leg = None
        if early:
            self._owner.news()

    # -- steps of a leg

    def _ask(
        self, active: ActiveRequest, leg: Leg, held_tokens: int | None, *, keep: bool = False
    ) -> None:
        request = request_to_prefill(
            active.request,
            leg_id=leg.leg_id,
            token_ids=active.sequence.token_ids,
            held_tokens=held_tokens,
            keep=keep,
        )
        leg.was_asked = True
        self._runtime.trace.stage(active.request.request_id, "asked")
        leg.peer.send(worker_pb2.DecodeToPrefill(prefill=request))

    def _offered(self, active: ActiveRequest, leg: Leg) -> None:
        if leg.phase == "asked":
            leg.phase = "offered"
            self._owner.enqueue(active)

    def _grant(self, active: ActiveRequest, leg: Leg) -> None:
        """Blocks are reserved: expect the KV of all tokens past those that are held."""
        runtime, sequence = self._runtime, active.sequence
        held = min(sequence.num_computed, leg.num_tokens - 1)
        leg.phase = "granted"
        runtime.trace.stage(active.request.request_id, "granted")
        leg.granted_at = leg.last_event_at = time.monotonic()
        leg.held = held
        leg.num_granted = leg.num_tokens - held
        leg.landing = LandingProgress(runtime.engine.spec.num_layers, held)
        # A kept leg may have grown: whatever of it has room is welcome.
        reserved = len(sequence.block_table) * runtime.pool.block_size
        self._transfers.receive(leg, held, reserved if leg.was_kept else leg.num_tokens)
        if leg.was_asked:
            grant = worker_pb2.Grant(leg_id=leg.leg_id, held_tokens=held, reserved_tokens=reserved)
            leg.peer.send(worker_pb2.DecodeToPrefill(grant=grant))
        else:
            self._ask(active, leg, held_tokens=held)

    def _started(self, active: ActiveRequest, leg: Leg, started: worker_pb2.PrefillStarted) -> None:
        if active.started_at is None:
            active.started_at = time.monotonic()
        if active.cached_tokens is None:
            cached = max(active.sequence.num_cached, started.cached_tokens)
            active.cached_tokens = min(cached, active.request.prompt_len)
        leg.computed = started.cached_tokens
        if started.fetch_end > started.fetch_start:
            # KV that we hold and the prefill worker lacks: nobody computes it twice.
            self._transfers.open_sends(leg)
            self._transfers.send_computed(leg, 0, started.fetch_start, started.fetch_end)
            leg.peer.transfer.finish_sends(leg.leg_id)

    # -- peers

    def _peer(self, target: worker_pb2.PrefillTarget) -> PrefillPeer:
        peer = self._peers.get(target.name)
        if peer is not None and peer.incarnation == target.incarnation and not peer.lost:
            return peer
        if peer is not None:
            peer.close()
            self.peer_lost(peer, "replaced by a newer incarnation")
        peer = PrefillPeer(target, self._runtime, self)
        self._peers[target.name] = peer
        return peer
