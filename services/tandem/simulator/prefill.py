"""A prefill worker under the virtual clock: offers, chunks, KV sent as layers are computed."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from tandem.core.config import SchedulerConfig
from tandem.core.errors import OverloadedError
from tandem.core.sequence import IterationPlan, Sequence
from tandem.simulator.clock import Clock
from tandem.simulator.flight import Flight, SimulatedLeg
from tandem.simulator.iterations import IterationLoop
from tandem.simulator.links import Links
from tandem.simulator.timeline import Recorder

if TYPE_CHECKING:
    from tandem.simulator.decode import SimulatedDecode

_ITERATIONS_OFFERED_AHEAD = 2
"""As in `tandem.prefill.worker`."""


class SimulatedPrefill:
    """The counterpart of `tandem.prefill.worker.PrefillWorker`."""

    def __init__(
        self,
        loop: IterationLoop,
        config: SchedulerConfig,
        clock: Clock,
        links: Links,
        rpc_seconds: float,
        recorder: Recorder | None,
    ) -> None:
        self.name = loop.name
        self._loop = loop
        self._clock = clock
        self._links = links
        self._rpc_seconds = rpc_seconds
        self._recorder = recorder
        self._ahead_limit = _ITERATIONS_OFFERED_AHEAD * config.max_batch_tokens
        self._by_sequence: dict[Sequence, tuple[Flight, SimulatedLeg]] = {}
        self._queued: dict[SimulatedDecode, dict[Sequence, None]] = defaultdict(dict)
        self._ahead: dict[SimulatedDecode, int] = defaultdict(int)
        """Tokens offered to each decode worker and not started."""

    # ------------------------------------------------------------------ what decode workers say

    def prefill(self, flight: Flight, leg: SimulatedLeg, granted: bool) -> None:
        """Take a leg."""
        leg.sequence.arrived_at = self._clock.now
        self._by_sequence[leg.sequence] = flight, leg
        if granted:
            self._ahead[flight.decode] += leg.num_tokens
            self.grant(flight, leg)
        else:
            self._queued[flight.decode][leg.sequence] = None
            self._loop.wake()

    def grant(self, flight: Flight, leg: SimulatedLeg) -> None:
        """The decode worker has reserved blocks."""
        leg.sequence.remote = leg.held_tokens > 0
        try:
            self._loop.scheduler.add(leg.sequence)
        except OverloadedError:
            self.cancel(flight, leg)
            self._clock.after(self._rpc_seconds, flight.decode.prefill_failed, flight)
            return
        self._loop.wake()

    def cancel(self, flight: Flight, leg: SimulatedLeg) -> None:
        """Drop a leg that was offered and has not started."""
        del self._by_sequence[leg.sequence]
        self._ahead[flight.decode] -= leg.num_tokens

    # ------------------------------------------------------------------ around an iteration

    def before_plan(self) -> None:
        """Offer each decode worker its next legs, enough to keep this worker busy."""
        line = self._loop.scheduler.policy.line
        for decode, queued in self._queued.items():
            if not queued or self._ahead[decode] >= self._ahead_limit:
                continue
            waiting = sorted(queued, key=lambda sequence: sequence.order)
            for sequence in line(waiting, self._clock.now):
                if self._ahead[decode] >= self._ahead_limit:
                    break
                flight, leg = self._by_sequence[sequence]
                self._ahead[decode] += leg.num_tokens
                del queued[sequence]
                self._clock.after(self._rpc_seconds, decode.offered, flight)

    def admitted(self, sequence: Sequence) -> None:
        """Blocks are reserved: fetch what the decode worker has, send what is cached here."""
        if self._loop.scheduler.is_restoring(sequence):
            return
        flight, leg = self._by_sequence[sequence]
        self._ahead[flight.decode] -= leg.num_tokens
        cached, held, now = sequence.num_computed, leg.held_tokens, self._clock.now
        if cached < held:
            arrival = self._links.send(flight.decode.name, self.name, held - cached, now)
            self._clock.at(arrival, self._fetched, sequence, held)
            return
        if cached > held:
            leg.landed_at = self._links.send(self.name, flight.decode.name, cached - held, now)
        if sequence.phase == "receiving":
            self._loop.scheduler.fall_back(sequence)

    def restored(self, sequence: Sequence) -> None:
        self.admitted(sequence)

    def preempted(self, sequence: Sequence) -> None:
        """Never: all blocks of a prompt are reserved when it is admitted."""
        raise AssertionError(f"{sequence.request.request_id} was preempted while prefilling")

    def computed(self, plan: IterationPlan, began: float) -> None:
        now = self._clock.now
        for chunk in plan.chunks:
            flight, leg = self._by_sequence[chunk.sequence]
            num_tokens = chunk.end - max(chunk.start, leg.held_tokens)
            if num_tokens <= 0:
                continue
            receiver = flight.decode.name
            first, leg.landed_at = self._links.send_chunk(
                self.name, receiver, num_tokens, began, now
            )
            if self._recorder is not None:
                name = flight.request.request_id
                self._recorder.transfer(self.name, receiver, name, first, leg.landed_at)

    def sampled(self, sequence: Sequence) -> None:
        """The last chunk is computed: the first token goes, and the leg is over here."""
        flight, leg = self._by_sequence.pop(sequence)
        self._loop.scheduler.finish(sequence, None)
        self._clock.after(self._rpc_seconds, flight.decode.first_token, flight, leg)
        self._clock.at(leg.landed_at, flight.decode.landed, flight, leg)

    def _fetched(self, sequence: Sequence, held: int) -> None:
        self._loop.scheduler.landed(sequence, held)
        self._loop.scheduler.fall_back(sequence)
        self._loop.wake()
