"""The gateway under the virtual clock: arrivals go through the real router, tokens are timed."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

from tandem.core.errors import TandemError
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import Sequence
from tandem.router import Router
from tandem.simulator.clock import Clock
from tandem.simulator.flight import Flight
from tandem.simulator.report import Report
from tandem.simulator.trace import HASHED_TOKENS, TraceRequest
from tandem.timeline.events import StageName, Timeline

if TYPE_CHECKING:
    from tandem.simulator.decode import SimulatedDecode
    from tandem.simulator.prefill import SimulatedPrefill

_HASH = struct.Struct("<qq")
"""A number of its own for every block comes first: routers know blocks by their first bytes."""


class SimulatedGateway:
    """Lets a trace arrive and keeps the account of every request."""

    def __init__(
        self,
        trace: list[TraceRequest],
        router: Router,
        clock: Clock,
        report: Report,
        block_size: int,
        way_seconds: float,
        recorder: Timeline | None = None,
    ) -> None:
        """`way_seconds`: from a request's arrival to its decode worker."""
        self.report = report
        self._recorder = recorder
        self._trace = trace
        self._router = router
        self._clock = clock
        self._block_size = block_size
        self._way_seconds = way_seconds

    def open(
        self, prefill: Mapping[str, SimulatedPrefill], decode: Mapping[str, SimulatedDecode]
    ) -> None:
        """Take the members of the cluster and let the first request come."""
        self._prefill, self._decode = prefill, decode
        self._router.set_members(prefill, decode)
        self._clock.at(self._trace[0].arrival, self._arrive, 0)

    def _arrive(self, number: int) -> None:
        traced = self._trace[number]
        if number + 1 < len(self._trace):
            self._clock.at(self._trace[number + 1].arrival, self._arrive, number + 1)
        request = Request(
            request_id=f"r{number}",
            token_ids=(number,) * traced.prompt_len,  # unlike any other where no hash says so
            prompt_len=traced.prompt_len,
            sampling=_sampling(traced.output_len),
            priority=traced.priority,
            tenant=traced.tenant,
            ttft_objective=traced.ttft_objective,
            itl_objective=traced.itl_objective,
        )
        hashes = block_hashes(traced, self._block_size)
        try:
            assigned = self._router.route(request.request_id, hashes, traced.prompt_len)
        except TandemError as error:
            self.report.refusals[type(error).__name__] += 1
            return
        sequence = Sequence(request, number, block_hashes=list(hashes))
        prefill = self._prefill[assigned.prefill] if assigned.prefill else None
        decode = self._decode[assigned.decode]
        flight = Flight(request, hashes, self._clock.now, decode, prefill, sequence)
        self.stage(flight, "gateway", "received")
        self._clock.after(self._way_seconds, decode.submit, flight)

    def stage(self, flight: Flight, process: str, name: StageName, at: float | None = None) -> None:
        """Note for the timeline, if there is one, that a request passed a boundary."""
        if self._recorder is not None:
            when = self._clock.now if at is None else at
            self._recorder.stage(process, when, flight.request.request_id, name)

    # ------------------------------------------------------------------ what decode workers say

    def token(self, flight: Flight, now: float) -> None:
        """One token has reached the client."""
        self.report.output_tokens += 1
        if flight.first_token_at:
            gap = now - flight.last_token_at
            self.report.gaps.add(gap)
            if gap > flight.longest_gap:
                flight.longest_gap = gap
        else:
            flight.first_token_at = now
            self.report.ttfts.append(now - flight.arrival)
            self._router.first_token(flight.request.request_id, is_local=flight.leg is None)
            self.stage(flight, "gateway", "client_first", now)
        flight.last_token_at = now

    def tokens(self, flights: list[Flight], times: list[float]) -> None:
        """Each of them has got a token at each of these times; it had one before."""
        report, first, last = self.report, times[0], times[-1]
        count = len(flights)
        report.output_tokens += count * len(times)
        longest = 0.0
        if len(times) > 1:
            gaps = [later - earlier for earlier, later in pairwise(times)]
            report.gaps.add_all(gaps, count)
            longest = max(gaps)
        report.gaps.add_all([first - flight.last_token_at for flight in flights])
        for flight in flights:
            gap = first - flight.last_token_at
            if gap < longest:
                gap = longest
            if gap > flight.longest_gap:
                flight.longest_gap = gap
            flight.last_token_at = last

    def finished(self, flight: Flight) -> None:
        """The last token was sent."""
        self.stage(flight, "gateway", "client_last", flight.last_token_at)
        self._router.release(flight.request.request_id)
        gaps = flight.request.sampling.max_tokens - 1
        lasted = flight.last_token_at - flight.first_token_at
        ttft = flight.first_token_at - flight.arrival
        self.report.finished(ttft, lasted / gaps if gaps else None, flight.longest_gap)
        self.report.seconds = flight.last_token_at

    def refused(self, flight: Flight, error: TandemError) -> None:
        """A worker would not take it."""
        self._router.release(flight.request.request_id)
        self.report.refusals[type(error).__name__] += 1


@cache
def _sampling(max_tokens: int) -> SamplingParams:
    """One object for all requests that are as long: making one costs more than finding it."""
    return SamplingParams(max_tokens=max_tokens)


def block_hashes(traced: TraceRequest, block_size: int) -> list[bytes]:
    """Names for the full blocks of a prompt, equal where the trace says that prefixes are equal."""
    if not traced.hash_ids:
        return []
    per_id = HASHED_TOKENS // block_size
    most = min(traced.prompt_len // block_size, len(traced.hash_ids) * per_id)
    ids = traced.hash_ids
    return [
        _HASH.pack(ids[index // per_id] * per_id + index % per_id, index % per_id)
        for index in range(most)
    ]
