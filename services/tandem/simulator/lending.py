"""A decode worker's slack under the virtual clock: what `router.lending` advises is done here.

The counterpart of `tandem.decode.lending`, and like it without a rule of its own. The loads of
prefill workers are read when a decision is made, so they are never out of date.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from tandem.core.config import TandemConfig
from tandem.router.lending import (
    MOST_PROMPTS,
    Prompt,
    advised_move,
    may_keep,
    prompt_of,
    prompts_here,
)
from tandem.scheduler.prompt_room import PromptRoom
from tandem.simulator.flight import Flight
from tandem.simulator.iterations import IterationLoop
from tandem.simulator.prefill import SimulatedPrefill

if TYPE_CHECKING:
    from tandem.simulator.decode import SimulatedDecode


class SimulatedLender:
    """Decides and moves. `news` says that something has changed; `rebalance` acts on it."""

    def __init__(self, worker: SimulatedDecode, loop: IterationLoop, config: TandemConfig) -> None:
        self._worker = worker
        self._loop = loop
        self._config = config.lending
        self.is_measured = config.lending.mode == "measured"
        """Whether the router's advice is asked for at all."""
        self._news = False
        if self.is_measured:
            objective = config.scheduler.itl_objective
            loop.scheduler.prompt_room = PromptRoom(objective, heeds_joining=True)

    @property
    def has_news(self) -> bool:
        """Whether prompts may have to move after the iteration under way."""
        return self._news

    def news(self) -> None:
        """Something has changed: prompts may have to move after the iteration under way."""
        self._news = self.is_measured

    def rebalance(self) -> None:
        """Move prompts while that makes one end sooner."""
        while self._news:
            flight = self._advised_move(self._prompts())
            self._news = flight is not None
            if flight is not None:
                flight.moves += 1
                self._move(flight)

    def is_sooner_elsewhere(self, flight: Flight, *, is_here: bool) -> bool:
        """Whether a prompt that comes now should not go where it would by default."""
        if not self.is_measured or flight.prefill is None:
            return False
        start = self._loop.scheduler.peek_cached(flight.sequence)
        own = self._prompt(flight, start, is_here=is_here)
        return self._advised_move([*self._prompts(stays=True), own]) is flight

    def keep_where_it_is(self) -> None:
        """Let idle prefill workers decode requests for which there are no blocks here."""
        waiting = self._loop.scheduler.waiting
        if not self.is_measured or not waiting:
            return
        for sequence in islice(waiting, MOST_PROMPTS):
            flight = self._worker.flight_of(sequence)
            leg, target = flight.leg, flight.prefill
            if leg is None or target is None or leg.phase != "offered":
                continue
            if self._may_keep(flight, target):
                self._worker.keep(flight, leg, target)

    def _move(self, flight: Flight) -> None:
        scheduler, sequence, leg = self._loop.scheduler, flight.sequence, flight.leg
        flight.is_lent = leg is not None
        if leg is not None:
            if not self._worker.cut(flight, leg):
                self._worker.compute_here(flight)
            return
        if sequence.phase == "waiting":
            scheduler.withdraw(sequence)
        else:
            scheduler.hand_out(sequence)
        self._worker.begin_leg(flight)

    def _may_keep(self, flight: Flight, target: SimulatedPrefill) -> bool:
        load = target.load(self._worker)
        legs = self._worker.legs.items()
        phases = [leg.phase for other, leg in legs if other.prefill is target]
        scheduler, most = self._loop.scheduler, self._config.max_kept
        return load is not None and may_keep(scheduler, flight.sequence, load, phases, most)

    # ------------------------------------------------------------------ what is decided from

    def _prompts(self, *, stays: bool = False) -> Iterator[Prompt[Flight]]:
        """Every prompt of this worker in the order in which its place serves it."""
        for sequence in prompts_here(self._loop.scheduler):
            flight = self._worker.flight_of(sequence)
            yield self._prompt(flight, sequence.num_computed, is_here=True, stays=stays)
        for flight, leg in self._worker.legs.items():
            if not (leg.phase == "cutting" or leg.was_kept or leg.first_token_at):
                start = max(leg.computed, leg.held_tokens)
                yield self._prompt(flight, start, is_here=False, stays=stays)

    def _prompt(
        self, flight: Flight, start: int, *, is_here: bool, stays: bool = False
    ) -> Prompt[Flight]:
        return prompt_of(
            self._loop.scheduler,
            flight,
            flight.sequence,
            start,
            flight.prefill.name if flight.prefill else "",
            is_here=is_here,
            moves_left=0 if stays else self._config.max_moves - flight.moves,
        )

    def _advised_move(self, prompts: Iterable[Prompt[Flight]]) -> Flight | None:
        prompts = list(islice(prompts, MOST_PROMPTS))
        targets = {prompt.target: prompt.key.prefill for prompt in prompts}
        known = {}
        for name, target in targets.items():
            load = target.load(self._worker) if target is not None else None
            if load is not None:
                known[name] = load
        return advised_move(self._loop.scheduler, known, prompts, self._config)
