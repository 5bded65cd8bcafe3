"""A prefill worker under the virtual clock: offers, chunks, KV sent as layers are computed."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from tandem.core.config import TandemConfig
from tandem.core.errors import OverloadedError
from tandem.core.sequence import IterationPlan, Sequence
from tandem.router.lending import NO_PROMPTS, PromptWork, WorkerLoad, load_of
from tandem.scheduler.costs import Work
from tandem.simulator.clock import Clock
from tandem.simulator.flight import Flight, SimulatedLeg
from tandem.simulator.iterations import IterationLoop
from tandem.simulator.links import Links
from tandem.timeline.events import Timeline, Transfer

if TYPE_CHECKING:
    from tandem.simulator.decode import SimulatedDecode

_ITERATIONS_OFFERED_AHEAD = 2
"""As in `tandem.prefill.worker`."""


class SimulatedPrefill:
    """The counterpart of `tandem.prefill.worker.PrefillWorker`."""

    is_steady = False
    """Every iteration is another."""

    def __init__(
        self,
        loop: IterationLoop,
        config: TandemConfig,
        clock: Clock,
        links: Links,
        rpc_seconds: float,
        recorder: Timeline | None,
    ) -> None:
        self.name = loop.name
        self._loop = loop
        self._clock = clock
        self._links = links
        self._rpc_seconds = rpc_seconds
        self._recorder = recorder
        self._ahead_limit = _ITERATIONS_OFFERED_AHEAD * config.scheduler.max_batch_tokens
        self._reports = config.lending.mode == "measured"
        self._heartbeat_seconds = config.worker.heartbeat_interval
        self._is_beating = False
        self._by_sequence: dict[Sequence, tuple[Flight, SimulatedLeg]] = {}
        self._queued: dict[SimulatedDecode, dict[Sequence, None]] = defaultdict(dict)
        self._num_queued = 0
        self._ahead: dict[SimulatedDecode, int] = defaultdict(int)
        """Tokens offered to each decode worker and not started."""
        self._pending: dict[SimulatedDecode, PromptWork] = defaultdict(PromptWork)
        """What is left to compute for each decode worker."""
        self._pending_in_all = NO_PROMPTS
        self._handovers: list[tuple[Flight, SimulatedLeg]] = []
        """Kept legs that were granted in an iteration."""
        self._cuts: list[tuple[Flight, SimulatedLeg]] = []

    @property
    def num_pending(self) -> int:
        """Prompt tokens that it still has to compute for decode workers that lend."""
        return self._pending_in_all.tokens

    def load(self, asker: SimulatedDecode) -> WorkerLoad | None:
        """What it says of itself to a decode worker; None: it has not computed enough to know."""
        if not self._loop.scheduler.costs.trusted:
            return None
        others = self._pending_in_all.exchanging(self._pending[asker], NO_PROMPTS)
        credit = self._clock.now - self._loop.began if self._loop.is_busy else 0.0
        return load_of(self._loop.scheduler, others, credit)

    def _beat(self) -> None:
        """Report to the decode workers that wait for legs, now and then, as a live worker does."""
        if self._reports and not self._is_beating:
            self._is_beating = True
            self._clock.after(self._heartbeat_seconds, self._report)

    def _report(self) -> None:
        self._is_beating = False
        for decode in dict.fromkeys(flight.decode for flight, _ in self._by_sequence.values()):
            self._clock.after(self._rpc_seconds, decode.reported)
            self._beat()

    # ------------------------------------------------------------------ what decode workers say

    def prefill(self, flight: Flight, leg: SimulatedLeg, granted: bool) -> None:
        """Take a leg."""
        leg.sequence.arrived_at = self._clock.now
        self._by_sequence[leg.sequence] = flight, leg
        self._reached(flight, leg, 0)
        self._beat()
        if granted:
            self._ahead[flight.decode] += leg.num_tokens
            self.grant(flight, leg)
        else:
            self._queued[flight.decode][leg.sequence] = None
            self._num_queued += 1
            self._loop.wake()

    def grant(self, flight: Flight, leg: SimulatedLeg) -> None:
        """The decode worker has reserved blocks."""
        if leg.is_kept:
            self._handovers.append((flight, leg))
            if not self._loop.is_busy:
                self._hand_over_now()
                self._loop.wake()
            return
        self._reached(flight, leg, leg.held_tokens)
        leg.sequence.remote = leg.held_tokens > 0
        try:
            self._loop.scheduler.add(leg.sequence)
        except OverloadedError:
            self.cancel(flight, leg)
            self._clock.after(self._rpc_seconds, flight.decode.prefill_failed, flight)
            return
        self._loop.wake()

    def keep(self, flight: Flight, leg: SimulatedLeg) -> None:
        """Decode a leg here until the decode worker has blocks."""
        if leg.sequence not in self._by_sequence:
            leg.sequence.arrived_at = self._clock.now
            self._reached(flight, leg, 0)
            self._by_sequence[leg.sequence] = flight, leg
            self._ahead[flight.decode] += leg.num_tokens
        self._loop.scheduler.add(leg.sequence)
        self._loop.wake()

    def _hand_over_now(self) -> None:
        """Send the KV of kept legs; those that have a token go on at their decode worker."""
        for flight, leg in self._handovers:
            sequence = leg.sequence
            if sequence not in self._by_sequence:
                continue  # it ended here
            leg.is_kept = False
            if sequence.phase == "waiting":
                sequence.remote = leg.held_tokens > 0
                continue
            computed = min(sequence.num_computed, leg.reserved_tokens)
            missing = max(0, computed - leg.held_tokens)
            now, receiver = self._clock.now, flight.decode.name
            leg.landed_at = self._links.send(self.name, receiver, missing, now)
            if sequence.num_tokens > leg.num_tokens:
                self._loop.scheduler.finish(sequence, None)
                del self._by_sequence[sequence]
                arrival = max(leg.landed_at, now + self._rpc_seconds)
                self._clock.at(arrival, flight.decode.was_cut, flight, leg, computed)
        self._handovers.clear()

    def _kept_token(self, flight: Flight, leg: SimulatedLeg) -> None:
        sequence = leg.sequence
        self._loop.scheduler.append(sequence, 0)
        self._clock.after(self._rpc_seconds, flight.decode.kept_token, flight, leg)
        if sequence.num_tokens >= flight.request.max_len:
            self._loop.scheduler.finish(sequence, None)
            del self._by_sequence[sequence]

    def cancel(self, flight: Flight, leg: SimulatedLeg) -> None:
        """Drop a leg that has not been granted; another can be offered in its place."""
        self._forget(flight, leg)
        self._loop.wake()

    def cut(self, flight: Flight, leg: SimulatedLeg) -> None:
        """Stop a granted leg at the end of the chunk under way."""
        if leg.sequence in self._by_sequence:
            self._cuts.append((flight, leg))
            if not self._loop.is_busy:
                self._cut_now()
                self._loop.wake()

    def _cut_now(self) -> None:
        for flight, leg in self._cuts:
            if leg.sequence in self._by_sequence:
                computed = max(leg.sequence.num_computed, leg.held_tokens)
                self._forget(flight, leg)
                arrival = max(leg.landed_at, self._clock.now + self._rpc_seconds)
                self._clock.at(arrival, flight.decode.was_cut, flight, leg, computed)
        self._cuts.clear()

    def _forget(self, flight: Flight, leg: SimulatedLeg) -> None:
        """A leg is over before its end."""
        sequence = leg.sequence
        self._reached(flight, leg, leg.num_tokens)
        if sequence in self._queued[flight.decode]:
            del self._queued[flight.decode][sequence]
            self._num_queued -= 1
        elif sequence.phase == "waiting":
            self._ahead[flight.decode] -= leg.num_tokens
        self._loop.scheduler.finish(sequence, None)
        del self._by_sequence[sequence]

    def _reached(self, flight: Flight, leg: SimulatedLeg, num_tokens: int) -> None:
        """A leg is done up to there: the rest of it is what this worker still has to do."""
        decode = flight.decode
        if decode.hears_progress:
            left = NO_PROMPTS.plus(num_tokens, leg.num_tokens)
            if left != leg.left:
                self._pending[decode] = self._pending[decode].exchanging(leg.left, left)
                self._pending_in_all = self._pending_in_all.exchanging(leg.left, left)
                leg.left = left

    # ------------------------------------------------------------------ around an iteration

    def before_plan(self) -> None:
        """Offer each decode worker its next legs, enough to keep this worker busy."""
        if not self._num_queued:  # there may be hundreds of decode workers
            return
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
                self._num_queued -= 1
                self._clock.after(self._rpc_seconds, decode.offered, flight, leg)

    def admitted(self, sequence: Sequence) -> None:
        """Blocks are reserved: fetch what the decode worker has, send what is cached here."""
        if self._loop.scheduler.is_restoring(sequence):
            return
        flight, leg = self._by_sequence[sequence]
        self._ahead[flight.decode] -= leg.num_tokens
        if leg.is_kept:
            return
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
        """A kept request has outgrown the blocks: its leg, or another, is started again."""
        flight, leg = self._by_sequence[sequence]
        self._forget(flight, leg)
        self._clock.after(self._rpc_seconds, flight.decode.prefill_failed, flight)

    def computed(self, plan: IterationPlan, work: Work, began: float) -> None:
        now = self._clock.now
        for chunk in plan.chunks:
            flight, leg = self._by_sequence[chunk.sequence]
            self._reached(flight, leg, min(chunk.end, leg.num_tokens))
            if leg.is_kept:
                continue
            if flight.decode.hears_progress:
                self._clock.after(self._rpc_seconds, flight.decode.progressed, leg, chunk.end)
            num_tokens = chunk.end - max(chunk.start, leg.held_tokens)
            if num_tokens <= 0:
                continue
            receiver = flight.decode.name
            first, leg.landed_at = self._links.send_chunk(
                self.name, receiver, num_tokens, began, now
            )
            if self._recorder is not None:
                name = flight.request.request_id
                span = (first, leg.landed_at, max(chunk.start, leg.held_tokens), num_tokens)
                self._recorder.transfer(Transfer(self.name, receiver, name, *span))

    def planned(self) -> None:
        """What waits here waits for its turn."""

    def ended(self) -> None:
        """The iteration is over, its samples are handed out."""
        self._cut_now()
        self._hand_over_now()

    def sampled(self, sequences: list[Sequence]) -> None:
        """The last chunk is computed: the first token goes, and the leg is over here."""
        for sequence in sequences:
            flight, leg = self._by_sequence[sequence]
            if leg.is_kept:
                self._kept_token(flight, leg)
                continue
            del self._by_sequence[sequence]
            self._loop.scheduler.finish(sequence, None)
            self._clock.after(self._rpc_seconds, flight.decode.first_token, flight, leg)
            self._clock.at(leg.landed_at, flight.decode.landed, flight, leg)

    def repeated(self, plan: IterationPlan, ends: list[float]) -> None:
        """Never: a sequence leaves with its first token."""
        raise AssertionError("a prefill worker decoded")

    def _fetched(self, sequence: Sequence, held: int) -> None:
        if sequence.phase != "receiving":
            return  # the leg was cut meanwhile
        self._loop.scheduler.landed(sequence, held)
        self._loop.scheduler.fall_back(sequence)
        self._loop.wake()
