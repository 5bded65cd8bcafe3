"""A decode worker under the virtual clock: late reservation, KV landing, continuous batching."""

from __future__ import annotations

from collections import Counter

from tandem.core.config import TandemConfig
from tandem.core.errors import TandemError
from tandem.core.sequence import IterationPlan, Sequence
from tandem.router.lending import local_prefill_limit, may_change_places
from tandem.scheduler import Scheduler
from tandem.scheduler.costs import Work
from tandem.simulator.clock import Clock
from tandem.simulator.flight import Flight, SimulatedLeg
from tandem.simulator.gateway import SimulatedGateway
from tandem.simulator.iterations import TOKEN, IterationLoop
from tandem.simulator.lending import SimulatedLender
from tandem.simulator.prefill import SimulatedPrefill


class SimulatedDecode:
    """The counterpart of `tandem.decode.worker.DecodeWorker` and its `Handoff`."""

    def __init__(
        self,
        loop: IterationLoop,
        clock: Clock,
        rpc_seconds: float,
        config: TandemConfig,
        gateway: SimulatedGateway,
    ) -> None:
        self.name = loop.name
        self._loop = loop
        self._clock = clock
        self._rpc_seconds = rpc_seconds
        self._lender = SimulatedLender(self, loop, config)
        self.hears_progress = self._lender.is_measured
        """Whether it matters here how far a prefill worker has come."""
        self._local_max = local_prefill_limit(config)
        self._gateway = gateway
        self._by_sequence: dict[Sequence, Flight] = {}
        self.legs: dict[Flight, SimulatedLeg] = {}
        """Prompts that prefill workers compute."""
        self._legs_on: Counter[SimulatedPrefill] = Counter()

    def submit(self, flight: Flight) -> None:
        """Take a request."""
        flight.sequence.arrived_at = self._clock.now
        try:
            self._loop.scheduler.check_fits(flight.request)
        except TandemError as error:
            self._gateway.refused(flight, error)
            return
        self._by_sequence[flight.sequence] = flight
        self._gateway.stage(flight, self.name, "accepted")
        self._prefill(flight)

    # ------------------------------------------------------------------ prefill elsewhere

    def _prefill(self, flight: Flight) -> None:
        """Send a sequence where the KV of its tokens is to be made."""
        missing = flight.sequence.num_tokens - self._loop.scheduler.peek_cached(flight.sequence)
        is_here = flight.prefill is None or missing <= self._local_max
        if self._lender.is_sooner_elsewhere(flight, is_here=is_here):
            is_here = not is_here
            flight.is_lent = is_here
        if is_here:
            self.compute_here(flight)
        else:
            self.begin_leg(flight)

    def compute_here(self, flight: Flight) -> None:
        """Let a sequence that has no leg compute what it lacks itself."""
        self._loop.scheduler.withdraw(flight.sequence)
        flight.sequence.remote = False
        self._enqueue(flight)

    def begin_leg(self, flight: Flight) -> None:
        """Let the prefill worker compute what a sequence lacks."""
        sequence, target = flight.sequence, flight.prefill
        if target is None:
            raise ValueError(f"{flight.request.request_id} has no prefill worker")
        sequence.remote = True
        idle = self._legs_on[target] == 0
        self._legs_on[target] += 1
        flight.leg = leg = SimulatedLeg(self._sequence_of_leg(flight), sequence.num_tokens)
        self.legs[flight] = leg
        if sequence.phase == "receiving":
            self._grant(flight, leg, target)
        elif idle:  # reserve now and let the request carry its grant
            leg.phase = "offered"
            self._enqueue(flight)
        else:
            leg.was_asked = True
            self._clock.after(self._rpc_seconds, target.prefill, flight, leg, False)

    def _sequence_of_leg(self, flight: Flight) -> Sequence:
        own = flight.sequence
        return Sequence(
            flight.request,
            own.arrival,
            token_ids=own.token_ids.copy(),
            block_hashes=list(flight.hashes),
        )

    def offered(self, flight: Flight, leg: SimulatedLeg) -> None:
        """The prefill worker could start soon: wait for blocks."""
        if flight.leg is leg:
            leg.phase = "offered"
            self._enqueue(flight)

    def _enqueue(self, flight: Flight) -> None:
        try:
            self._loop.scheduler.add(flight.sequence)
        except TandemError as error:
            del self._by_sequence[flight.sequence]
            self._gateway.refused(flight, error)
            return
        self._loop.wake()

    def first_token(self, flight: Flight, leg: SimulatedLeg) -> None:
        """The prefill worker sampled."""
        leg.first_token_at = self._clock.now
        self._token(flight)
        joined = self._join(flight, leg)
        self._loop.wake(cuts=joined or flight.sequence.phase == "finished")

    def landed(self, flight: Flight, leg: SimulatedLeg) -> None:
        """All KV of a leg is in its blocks."""
        leg.has_landed = True
        self._loop.wake(cuts=self._join(flight, leg))

    def _join(self, flight: Flight, leg: SimulatedLeg) -> bool:
        """Let a request decode that has both; until then it changes nothing for the others."""
        if not (leg.first_token_at and leg.has_landed):
            return False
        self._end_leg(flight, early=False)
        self._loop.scheduler.preemption.prefilled(
            leg.num_tokens - leg.held_tokens, self._clock.now - leg.granted_at
        )
        self._gateway.stage(flight, self.name, "joined")
        self._gateway.report.exposed_transfer(max(0.0, leg.landed_at - leg.first_token_at))
        if flight.sequence.phase == "receiving":
            self._loop.scheduler.landed(flight.sequence, leg.num_tokens)
            self._loop.scheduler.join(flight.sequence)
        return True

    def _end_leg(self, flight: Flight, *, early: bool) -> None:
        """`early`: the prompt is not computed, so others may be computed sooner elsewhere."""
        if flight.prefill is not None and flight.leg is not None:
            self._legs_on[flight.prefill] -= 1
            del self.legs[flight]
            flight.leg = None
            if early:
                self._lender.news()

    def prefill_failed(self, flight: Flight) -> None:
        """The prefill worker is too full for the leg after all: compute what is missing here."""
        self._end_leg(flight, early=True)
        if flight.sequence.phase == "receiving":
            self._loop.scheduler.fall_back(flight.sequence)
        else:
            self.compute_here(flight)
        self._loop.wake()

    # ------------------------------------------------------------------ around an iteration

    @property
    def is_steady(self) -> bool:
        """Whether nothing but decode steps is to be done for now: no prompt may have to move."""
        return not self._lender.has_news

    def before_plan(self) -> None:
        """Requests come by themselves; where their prompts are computed may change."""
        self._lender.rebalance()

    def planned(self) -> None:
        """Requests that found no blocks may be decoded where they were prefilled."""
        self._lender.keep_where_it_is()

    def admitted(self, sequence: Sequence) -> None:
        flight = self._by_sequence[sequence]
        leg, target = flight.leg, flight.prefill
        if self._loop.scheduler.is_restoring(sequence):
            return
        if not sequence.remote or leg is None or target is None:
            return
        if sequence.num_uncomputed <= self._local_max and not leg.is_kept:
            self._cancel(flight, leg)
            self._loop.scheduler.fall_back(sequence)
            return
        self._grant(flight, leg, target)

    def _grant(self, flight: Flight, leg: SimulatedLeg, target: SimulatedPrefill) -> None:
        leg.granted_at = self._clock.now
        leg.held_tokens = min(flight.sequence.num_computed, leg.num_tokens - 1)
        leg.phase = "granted"
        leg.reserved_tokens = (
            len(flight.sequence.block_table) * self._loop.scheduler.pool.block_size
        )
        if leg.was_asked:
            self._clock.after(self._rpc_seconds, target.grant, flight, leg)
        else:
            self._clock.after(self._rpc_seconds, target.prefill, flight, leg, True)

    def restored(self, sequence: Sequence) -> None:
        if sequence.remote:
            self.admitted(sequence)
        else:
            self._loop.scheduler.fall_back(sequence)

    def _cancel(self, flight: Flight, leg: SimulatedLeg) -> None:
        """Drop a leg that has not been granted."""
        if leg.was_asked and flight.prefill is not None:
            self._clock.after(self._rpc_seconds, flight.prefill.cancel, flight, leg)
        self._end_leg(flight, early=True)

    def preempted(self, sequence: Sequence) -> None:
        flight = self._by_sequence[sequence]
        flight.preemptions += 1
        self._gateway.stage(flight, self.name, "preempted")
        self._prefill(flight)

    def computed(self, plan: IterationPlan, work: Work, began: float) -> None:
        """Count what was computed for the prefill pool."""
        if not self.hears_progress:
            return
        if work.prompt_tokens:
            for chunk in plan.chunks:
                if chunk.length > 1 and self._by_sequence[chunk.sequence].is_lent:
                    self._gateway.report.lent_tokens += chunk.length
        if may_change_places(work, self._loop.scheduler):
            self._lender.news()

    def ended(self) -> None:
        """Nothing waits for the end of an iteration."""

    def sampled(self, sequences: list[Sequence]) -> None:
        scheduler, arrival = self._loop.scheduler, self._clock.now + self._rpc_seconds
        for sequence in sequences:
            flight = self._by_sequence[sequence]
            scheduler.append(sequence, TOKEN)
            self._emit(flight, scheduler, arrival)

    def repeated(self, plan: IterationPlan, ends: list[float]) -> None:
        flights = [self._by_sequence[chunk.sequence] for chunk in plan.chunks]
        self._gateway.tokens(flights, [end + self._rpc_seconds for end in ends])

    def _token(self, flight: Flight) -> None:
        """A prefill worker drew a token."""
        scheduler = self._loop.scheduler
        scheduler.append(flight.sequence, TOKEN)
        self._emit(flight, scheduler, self._clock.now + self._rpc_seconds)

    def _emit(self, flight: Flight, scheduler: Scheduler, arrival: float) -> None:
        """Send a token that its sequence has got; the last one ends it."""
        sequence = flight.sequence
        if not flight.first_token_at:
            self._gateway.stage(flight, self.name, "first_token")
        self._gateway.token(flight, arrival)
        if len(sequence.token_ids) >= sequence.max_len:
            scheduler.finish(sequence, "length")
            del self._by_sequence[sequence]
            if self.legs:
                self._lender.news()  # its blocks and its part of each iteration are free
            self._gateway.stage(flight, self.name, "finished")
            self._gateway.finished(flight)

    # ------------------------------------------------------------------ lending

    def flight_of(self, sequence: Sequence) -> Flight:
        """Return the request of a sequence of this worker."""
        return self._by_sequence[sequence]

    def progressed(self, leg: SimulatedLeg, num_computed: int) -> None:
        """The prefill worker has computed a chunk."""
        leg.computed = num_computed

    def reported(self) -> None:
        """A prefill worker that computes prompts for this one has said how loaded it is."""
        self._lender.news()
        self._loop.wake()

    def was_cut(self, flight: Flight, leg: SimulatedLeg, num_tokens: int) -> None:
        """What was computed of a leg has landed: go on from there."""
        if flight.leg is leg:
            self._end_leg(flight, early=True)
            self._loop.scheduler.landed(flight.sequence, num_tokens)
            self._loop.scheduler.fall_back(flight.sequence)
            self._loop.wake()

    def kept_token(self, flight: Flight, leg: SimulatedLeg) -> None:
        """The prefill worker decodes this request: pass its token on."""
        if flight.leg is leg:
            self._gateway.report.kept_tokens += 1
            self._token(flight)
            if flight.sequence.phase == "finished":
                self._end_leg(flight, early=False)
            self._loop.wake()

    def keep(self, flight: Flight, leg: SimulatedLeg, target: SimulatedPrefill) -> None:
        """Let the prefill worker decode a request for which there are no blocks here."""
        leg.phase, leg.is_kept, leg.was_kept, leg.was_asked = "kept", True, True, True
        self._clock.after(self._rpc_seconds, target.keep, flight, leg)

    def cut(self, flight: Flight, leg: SimulatedLeg) -> bool:
        """End a leg with the chunk under way; False: it had not begun and is over at once."""
        if flight.prefill is not None and leg.phase == "granted":
            leg.phase = "cutting"
            self._clock.after(self._rpc_seconds, flight.prefill.cut, flight, leg)
            return True
        self._cancel(flight, leg)
        return False
