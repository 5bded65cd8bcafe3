"""A decode worker under the virtual clock: late reservation, KV landing, continuous batching."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

from tandem.core.config import TandemConfig
from tandem.core.errors import TandemError
from tandem.core.sequence import IterationPlan, Sequence
from tandem.router.lending import (
    MOST_PROMPTS,
    Prompt,
    advised_move,
    local_prefill_limit,
    may_keep,
    prompt_of,
    prompts_here,
)
from tandem.scheduler import Scheduler
from tandem.scheduler.prompt_room import PromptRoom
from tandem.simulator.clock import Clock
from tandem.simulator.flight import Flight, SimulatedLeg
from tandem.simulator.gateway import SimulatedGateway
from tandem.simulator.iterations import TOKEN, IterationLoop
from tandem.simulator.prefill import SimulatedPrefill


class SimulatedDecode:
    """The counterpart of `tandem.decode.worker.DecodeWorker` and its `Handoff`."""

    decodes = True

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
        self._lending = config.lending
        self.hears_progress = config.lending.mode == "measured"
        """Whether it matters here how far a prefill worker has come."""
        self._local_max = local_prefill_limit(config)
        self._gateway = gateway
        self._by_sequence: dict[Sequence, Flight] = {}
        self._legs: dict[Flight, SimulatedLeg] = {}
        self._legs_on: Counter[SimulatedPrefill] = Counter()
        self._news = False
        if config.lending.mode == "measured":
            objective = config.scheduler.itl_objective
            loop.scheduler.prompt_room = PromptRoom(objective, heeds_joining=True)

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
        if flight.prefill is not None and self._is_sooner_elsewhere(flight, is_here=is_here):
            is_here = not is_here
            flight.is_lent = is_here
        if is_here:
            flight.sequence.remote = False
            self._enqueue(flight)
        else:
            self._begin_leg(flight)

    def _begin_leg(self, flight: Flight) -> None:
        """Let the prefill worker compute what a sequence lacks."""
        sequence, target = flight.sequence, flight.prefill
        if target is None:
            raise ValueError(f"{flight.request.request_id} has no prefill worker")
        sequence.remote = True
        idle = self._legs_on[target] == 0
        self._legs_on[target] += 1
        flight.leg = leg = SimulatedLeg(self._sequence_of_leg(flight), sequence.num_tokens)
        self._legs[flight] = leg
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
        self._end_leg(flight)
        self._loop.scheduler.preemption.prefilled(
            leg.num_tokens - leg.held_tokens, self._clock.now - leg.granted_at
        )
        self._gateway.stage(flight, self.name, "joined")
        self._gateway.report.exposed_transfer(max(0.0, leg.landed_at - leg.first_token_at))
        if flight.sequence.phase == "receiving":
            self._loop.scheduler.landed(flight.sequence, leg.num_tokens)
            self._loop.scheduler.join(flight.sequence)
        return True

    def _end_leg(self, flight: Flight) -> None:
        if flight.prefill is not None and flight.leg is not None:
            self._legs_on[flight.prefill] -= 1
            del self._legs[flight]
            flight.leg = None
            self._news = True

    def prefill_failed(self, flight: Flight) -> None:
        """The prefill worker is too full for the leg after all: compute what is missing here."""
        self._end_leg(flight)
        if flight.sequence.phase == "receiving":
            self._loop.scheduler.fall_back(flight.sequence)
        else:
            self._loop.scheduler.withdraw(flight.sequence)
            flight.sequence.remote = False
            self._enqueue(flight)
        self._loop.wake()

    # ------------------------------------------------------------------ around an iteration

    def before_plan(self) -> None:
        """Requests come by themselves; where their prompts are computed may change."""
        self._rebalance()

    def admitted(self, sequence: Sequence) -> None:
        flight = self._by_sequence[sequence]
        leg, target = flight.leg, flight.prefill
        if self._loop.scheduler.is_restoring(sequence):
            return
        if not sequence.remote or leg is None or target is None:
            return
        if sequence.num_uncomputed <= self._local_max and not leg.is_kept:
            self._cancel(flight, leg, target)
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

    def _cancel(self, flight: Flight, leg: SimulatedLeg, target: SimulatedPrefill) -> None:
        """Drop a leg that has not been granted."""
        if leg.was_asked:
            self._clock.after(self._rpc_seconds, target.cancel, flight, leg)
        self._end_leg(flight)

    # ------------------------------------------------------------------ lending

    def progressed(self, leg: SimulatedLeg, num_computed: int) -> None:
        """The prefill worker has computed a chunk."""
        leg.computed = num_computed
        self._news = True

    def was_cut(self, flight: Flight, leg: SimulatedLeg, num_tokens: int) -> None:
        """What was computed of a leg has landed: go on from there."""
        if flight.leg is leg:
            self._end_leg(flight)
            self._loop.scheduler.landed(flight.sequence, num_tokens)
            self._loop.scheduler.fall_back(flight.sequence)
            self._loop.wake()

    def kept_token(self, flight: Flight, leg: SimulatedLeg) -> None:
        """The prefill worker decodes this request: pass its token on."""
        if flight.leg is leg:
            self._gateway.report.kept_tokens += 1
            self._token(flight)
            if flight.sequence.phase == "finished":
                self._end_leg(flight)
            self._loop.wake()

    def planned(self) -> None:
        """Let idle prefill workers decode requests for which there are no blocks here."""
        scheduler = self._loop.scheduler
        if self._lending.mode != "measured" or not scheduler.waiting:
            return
        for sequence in islice(scheduler.waiting, MOST_PROMPTS):
            flight = self._by_sequence[sequence]
            leg, target = flight.leg, flight.prefill
            if leg is None or target is None or leg.phase != "offered":
                continue
            if self._may_keep(flight, target):
                leg.phase, leg.is_kept, leg.was_kept, leg.was_asked = "kept", True, True, True
                self._clock.after(self._rpc_seconds, target.keep, flight, leg)

    def _may_keep(self, flight: Flight, target: SimulatedPrefill) -> bool:
        load = target.load(self)
        phases = [leg.phase for other, leg in self._legs.items() if other.prefill is target]
        scheduler, most = self._loop.scheduler, self._lending.max_kept
        return load is not None and may_keep(scheduler, flight.sequence, load, phases, most)

    def _prompts(self) -> Iterator[Prompt[Flight]]:
        """Every prompt of this worker in the order in which its place serves it."""
        for sequence in prompts_here(self._loop.scheduler):
            yield self._prompt(self._by_sequence[sequence], sequence.num_computed, is_here=True)
        for flight, leg in self._legs.items():
            if not (leg.phase == "cutting" or leg.was_kept or leg.first_token_at):
                yield self._prompt(flight, max(leg.computed, leg.held_tokens), is_here=False)

    def _prompt(self, flight: Flight, start: int, *, is_here: bool) -> Prompt[Flight]:
        return prompt_of(
            self._loop.scheduler,
            flight,
            flight.sequence,
            start,
            flight.prefill.name if flight.prefill else "",
            is_here=is_here,
            moves_left=self._lending.max_moves - flight.moves,
        )

    def _advised_move(self, prompts: Iterable[Prompt[Flight]]) -> Flight | None:
        prompts = list(islice(prompts, MOST_PROMPTS))
        targets = [prompt.key.prefill for prompt in prompts if prompt.key.prefill]
        loads = {target.name: target.load(self) for target in dict.fromkeys(targets)}
        known = {name: load for name, load in loads.items() if load is not None}
        return advised_move(self._loop.scheduler, known, prompts, self._lending)

    def _is_sooner_elsewhere(self, flight: Flight, *, is_here: bool) -> bool:
        """Whether a prompt that comes now should not go where it would by default."""
        if self._lending.mode != "measured":
            return False
        fixed = [prompt._replace(may_move=False) for prompt in self._prompts()]
        start = self._loop.scheduler.peek_cached(flight.sequence)
        return self._advised_move([*fixed, self._prompt(flight, start, is_here=is_here)]) is flight

    def _rebalance(self) -> None:
        """Move prompts while that makes one end sooner."""
        while self._news and self._lending.mode == "measured":
            flight = self._advised_move(self._prompts())
            self._news = flight is not None
            if flight is not None:
                flight.moves += 1
                self._move(flight)

    def _move(self, flight: Flight) -> None:
        scheduler, sequence, leg = self._loop.scheduler, flight.sequence, flight.leg
        flight.is_lent = leg is not None
        if leg is None:
            if sequence.phase == "waiting":
                scheduler.withdraw(sequence)
            else:
                scheduler.hand_out(sequence)
            self._begin_leg(flight)
        elif leg.phase == "granted" and flight.prefill:
            leg.phase = "cutting"
            self._clock.after(self._rpc_seconds, flight.prefill.cut, flight, leg)
        elif flight.prefill:
            self._cancel(flight, leg, flight.prefill)
            scheduler.withdraw(sequence)
            sequence.remote = False
            self._enqueue(flight)

    def preempted(self, sequence: Sequence) -> None:
        flight = self._by_sequence[sequence]
        flight.preemptions += 1
        self._gateway.stage(flight, self.name, "preempted")
        self._prefill(flight)

    def computed(self, plan: IterationPlan, began: float) -> None:
        """Count what was computed for the prefill pool."""
        if not self.hears_progress:
            return
        for chunk in plan.chunks:
            if chunk.length > 1:
                self._news = True
                if self._by_sequence[chunk.sequence].is_lent:
                    self._gateway.report.lent_tokens += chunk.length

    def ended(self) -> None:
        """Without a prompt anywhere there is nothing to move."""
        self._news |= bool(self._legs or self._loop.scheduler.waiting)

    def sampled(self, sequences: list[Sequence]) -> None:
        scheduler, arrival = self._loop.scheduler, self._clock.now + self._rpc_seconds
        for sequence in sequences:
            flight = self._by_sequence[sequence]
            scheduler.append(sequence, TOKEN)
            self._emit(flight, scheduler, arrival)

    def repeated(self, plan: IterationPlan, ends: list[float]) -> None:
        flights = [self._by_sequence[chunk.sequence] for chunk in plan.chunks]
        times = [end + self._rpc_seconds for end in ends]
        if all(flight.first_token_at for flight in flights):
            self._gateway.tokens(flights, times)
            return
        for flight in flights:  # a prompt whose last chunk was one token
            for time in times:
                self._gateway.token(flight, time)

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
        if len(sequence.token_ids) >= flight.request.max_len:
            scheduler.finish(sequence, "length")
            del self._by_sequence[sequence]
            self._gateway.stage(flight, self.name, "finished")
            self._gateway.finished(flight)
