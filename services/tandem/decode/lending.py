"""The decode worker's slack, lent to prompts that would end sooner here than where they wait.

Gathers what `router.lending` decides from, when something has changed, and carries out what it
says. Engine thread only. Invariant: one prompt moves at most `lending.max_moves` times, and what is
computed of it anywhere is kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Protocol

import structlog

from tandem.core.sequence import Sequence
from tandem.decode.active import ActiveRequest
from tandem.decode.handoff import Handoff
from tandem.decode.peers import PrefillPeer
from tandem.router.lending import (
    MOST_PROMPTS,
    Prompt,
    WorkerLoad,
    advised_move,
    may_keep,
    prompt_of,
    prompts_here,
)
from tandem.scheduler.prompt_room import PromptRoom
from tandem.worker.load import load_from_proto
from tandem.worker.runtime import WorkerRuntime

log = structlog.get_logger(__name__)


class LendingOwner(Protocol):
    """Who knows the requests."""

    def request_of(self, sequence: Sequence) -> ActiveRequest: ...

    def compute_here(self, active: ActiveRequest) -> None:
        """Its leg is over: compute what is missing of its prompt here."""


class Lender:
    """Decides and moves. `news` says that something has changed; `rebalance` acts on it."""

    def __init__(self, runtime: WorkerRuntime, handoff: Handoff, owner: LendingOwner) -> None:
        self._runtime = runtime
        self._handoff = handoff
        self._owner = owner
        self._config = runtime.config.lending
        self._is_measured = self._config.mode == "measured" and runtime.config.worker.disaggregated
        self.news = False
        if self._is_measured:
            objective = runtime.config.scheduler.itl_objective
            runtime.scheduler.prompt_room = PromptRoom(objective, heeds_joining=True)

    def is_sooner_elsewhere(self, active: ActiveRequest, start: int, *, is_here: bool) -> bool:
        """Whether a prompt that comes now should not go where it would by default.

        `start`: its tokens that need not be computed.
        """
        if not self._is_measured or active.target is None:
            return False
        own = self._prompt(active, start, is_here=is_here)
        return self._advised_move([*self._prompts(stays=True), own]) is active

    def rebalance(self) -> None:
        """Move prompts while that lets one end sooner; of no cost while nothing has changed."""
        while self.news and self._is_measured:
            active = self._advised_move(self._prompts())
            self.news = active is not None
            if active is not None:
                active.moves += 1
                self._move(active)

    def keep_where_it_is(self) -> None:
        """Let idle prefill workers decode requests for which there are no blocks here."""
        scheduler = self._runtime.scheduler
        if not (self._is_measured and self._config.max_kept):
            return
        for sequence in islice(scheduler.waiting, MOST_PROMPTS):
            active = self._owner.request_of(sequence)
            leg = active.leg
            if leg is not None and leg.phase == "offered" and self._may_keep(sequence, leg.peer):
                self._handoff.keep(active, leg)
                log.info(
                    "request kept by its prefill worker", worker=self._runtime.name,
                    request=active.request.request_id, peer=leg.peer.name,
                )  # fmt: skip

    def _may_keep(self, sequence: Sequence, peer: PrefillPeer) -> bool:
        if peer.load is None or not peer.load.HasField("costs"):
            return False
        phases = [leg.phase for leg in self._handoff.legs_on(peer)]
        load = load_from_proto(peer.load, 0.0)
        return may_keep(self._runtime.scheduler, sequence, load, phases, self._config.max_kept)

    def _move(self, active: ActiveRequest) -> None:
        scheduler, sequence, leg = self._runtime.scheduler, active.sequence, active.leg
        active.is_lent = leg is not None
        direction = "here" if leg is not None else "away"
        self._runtime.metrics.count_move(direction)
        self._runtime.count_lent(0, requests=int(active.is_lent))
        log.debug(
            "prompt moved", worker=self._runtime.name, request=active.request.request_id,
            direction=direction, kept_tokens=sequence.num_computed, tokens=sequence.num_tokens,
        )  # fmt: skip
        if leg is not None:
            if not self._handoff.cut(active):
                self._owner.compute_here(active)
            return
        if active.target is None:
            raise ValueError(f"{active.key} has no prefill worker to go to")
        if sequence.phase == "waiting":
            scheduler.withdraw(sequence)
        else:
            scheduler.hand_out(sequence)
        self._handoff.begin(active, active.target)

    # -- what the decision is made from

    def _prompts(self, *, stays: bool = False) -> Iterator[Prompt[ActiveRequest]]:
        """Every prompt of this worker in the order in which its place serves it."""
        for sequence in prompts_here(self._runtime.scheduler):
            active = self._owner.request_of(sequence)
            yield self._prompt(active, sequence.num_computed, is_here=True, stays=stays)
        for active, leg in self._handoff.movable_legs():
            yield self._prompt(active, leg.num_ready, is_here=False, stays=stays)

    def _prompt(
        self, active: ActiveRequest, start: int, *, is_here: bool, stays: bool = False
    ) -> Prompt[ActiveRequest]:
        return prompt_of(
            self._runtime.scheduler,
            active,
            active.sequence,
            start,
            active.target.name if active.target else "",
            is_here=is_here,
            moves_left=0 if stays else self._config.max_moves - active.moves,
        )

    def _advised_move(self, prompts: Iterable[Prompt[ActiveRequest]]) -> ActiveRequest | None:
        loads = self._loads()
        return advised_move(self._runtime.scheduler, loads, prompts, self._config)

    def _loads(self) -> Mapping[str, WorkerLoad]:
        """What prefill workers have said, with the time that has passed since."""
        loads = {}
        for peer in self._handoff.peers:
            if peer.load is not None and peer.load.HasField("costs"):
                credit = time.monotonic() - peer.progress_at
                loads[peer.name] = load_from_proto(peer.load, credit)
        return loads
