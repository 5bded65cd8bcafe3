"""A decode worker under the virtual clock: late reservation, KV landing, continuous batching."""

from __future__ import annotations

from collections import Counter

from tandem.core.errors import TandemError
from tandem.core.sequence import IterationPlan, Sequence
from tandem.simulator.clock import Clock
from tandem.simulator.flight import Flight, SimulatedLeg
from tandem.simulator.gateway import SimulatedGateway
from tandem.simulator.iterations import IterationLoop
from tandem.simulator.prefill import SimulatedPrefill


class SimulatedDecode:
    """The counterpart of `tandem.decode.worker.DecodeWorker` and its `Handoff`."""

    def __init__(
        self,
        loop: IterationLoop,
        clock: Clock,
        rpc_seconds: float,
        local_prefill_max_tokens: int,
        gateway: SimulatedGateway,
    ) -> None:
        self.name = loop.name
        self._loop = loop
        self._clock = clock
        self._rpc_seconds = rpc_seconds
        self._local_max = local_prefill_max_tokens
        self._gateway = gateway
        self._by_sequence: dict[Sequence, Flight] = {}
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
        self._prefill(flight)

    # ------------------------------------------------------------------ prefill elsewhere

    def _prefill(self, flight: Flight) -> None:
        """Send a sequence where the KV of its tokens is to be made."""
        sequence, target = flight.sequence, flight.prefill
        missing = sequence.num_tokens - self._loop.scheduler.peek_cached(sequence)
        if target is None or missing <= self._local_max:
            sequence.remote = False
            self._enqueue(flight)
            return
        sequence.remote = True
        idle = self._legs_on[target] == 0
        self._legs_on[target] += 1
        flight.leg = SimulatedLeg(self._sequence_of_leg(flight), sequence.num_tokens)
        if idle:  # reserve now and let the request carry its grant
            self._enqueue(flight)
        else:
            flight.leg.was_asked = True
            self._clock.after(self._rpc_seconds, target.prefill, flight, flight.leg, False)

    def _sequence_of_leg(self, flight: Flight) -> Sequence:
        sequence = Sequence(flight.request, flight.sequence.arrival)
        sequence.token_ids = list(flight.sequence.token_ids)
        sequence.block_hashes = list(flight.hashes)
        return sequence

    def offered(self, flight: Flight) -> None:
        """The prefill worker could start soon: wait for blocks."""
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
        self._join(flight, leg)
        self._loop.wake()

    def landed(self, flight: Flight, leg: SimulatedLeg) -> None:
        """All KV of a leg is in its blocks."""
        leg.has_landed = True
        self._join(flight, leg)
        self._loop.wake()

    def _join(self, flight: Flight, leg: SimulatedLeg) -> None:
        if not (leg.first_token_at and leg.has_landed):
            return
        self._end_leg(flight)
        self._loop.scheduler.preemption.prefilled(
            leg.num_tokens - leg.held_tokens, self._clock.now - leg.granted_at
        )
        self._gateway.report.exposed_transfer(max(0.0, leg.landed_at - leg.first_token_at))
        if flight.sequence.phase == "receiving":
            self._loop.scheduler.landed(flight.sequence, leg.num_tokens)
            self._loop.scheduler.join(flight.sequence)

    def _end_leg(self, flight: Flight) -> None:
        if flight.prefill is not None and flight.leg is not None:
            self._legs_on[flight.prefill] -= 1
            flight.leg = None

    def prefill_failed(self, flight: Flight) -> None:
        """The prefill worker is too full to take the leg after all: compute the prompt here."""
        self._end_leg(flight)
        self._loop.scheduler.fall_back(flight.sequence)
        self._loop.wake()

    # ------------------------------------------------------------------ around an iteration

    def before_plan(self) -> None:
        """Requests come by themselves."""

    def admitted(self, sequence: Sequence) -> None:
        flight = self._by_sequence[sequence]
        leg, target = flight.leg, flight.prefill
        if self._loop.scheduler.is_restoring(sequence):
            return
        if not sequence.remote or leg is None or target is None:
            return
        if sequence.num_uncomputed <= self._local_max:
            if leg.was_asked:
                self._clock.after(self._rpc_seconds, target.cancel, flight, leg)
            self._end_leg(flight)
            self._loop.scheduler.fall_back(sequence)
            return
        leg.granted_at = self._clock.now
        leg.held_tokens = min(sequence.num_computed, leg.num_tokens - 1)
        if leg.was_asked:
            self._clock.after(self._rpc_seconds, target.grant, flight, leg)
        else:
            self._clock.after(self._rpc_seconds, target.prefill, flight, leg, True)

    def restored(self, sequence: Sequence) -> None:
        if sequence.remote:
            self.admitted(sequence)
        else:
            self._loop.scheduler.fall_back(sequence)

    def preempted(self, sequence: Sequence) -> None:
        flight = self._by_sequence[sequence]
        flight.preemptions += 1
        self._prefill(flight)

    def computed(self, plan: IterationPlan, began: float) -> None:
        """Nothing is sent from here."""

    def sampled(self, sequence: Sequence) -> None:
        self._token(self._by_sequence[sequence])

    def _token(self, flight: Flight) -> None:
        sequence = flight.sequence
        self._loop.scheduler.append(sequence, 0)
        self._gateway.token(flight, self._clock.now + self._rpc_seconds)
        if sequence.num_tokens >= flight.request.max_len:
            self._loop.scheduler.finish(sequence, "length")
            del self._by_sequence[sequence]
            self._gateway.finished(flight)
