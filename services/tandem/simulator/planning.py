"""Which cluster serves a trace best: the highest rate per worker at which the objectives are met.

A race: all candidates serve the same stretches of the trace at a rate that rises from rung to rung,
and whoever meets the objectives of too few requests drops out; longer stretches as fewer are left,
so that every rung simulates about as many requests. A scout finds the rung to begin with.
The last ones are measured closely, on several stretches each, so that it can be said how sure the
order is. Then the winner's machine is made better in one respect at a time: what helps most is what
limits it. Pure, but for the caller's `Runner`, which may use several cores; same seed, same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean

from tandem.core.config import TandemConfig
from tandem.core.errors import ConfigError
from tandem.scheduler.costs import Work
from tandem.simulator.bracket import RUNG, Bracket
from tandem.simulator.cluster import ClusterSpec
from tandem.simulator.limits import improvements
from tandem.simulator.profile import Profile
from tandem.simulator.sweep import with_chunk, with_policy
from tandem.simulator.trace import TraceRequest

CHUNKS = (512, 2048)
POLICIES = ("chunked_prefill", "concatenation", "shortest_prompt", "deadline", "auto_chunk")
_START = 0.25
"""The first rung, as a part of what the workers could do if nobody ever waited."""
_FAR = 64
"""How far from the first rung rates are looked for, either way."""
_FEWEST = 64
"""Requests of a stretch."""
_RUNG_SHARE = 0.1
"""What part of all requests that may be simulated one rung takes; a finalist's trials together take
less than `_FINAL_SHARE`."""
_FINAL_SHARE = 0.15
_FINALISTS = 3
_TRIALS = 6
"""About as many does it take to bracket a finalist's rate on one stretch."""
_OVER = 1.1
"""How far above the winner's rate its limits are looked for."""


@dataclass(frozen=True)
class Candidate:
    """One way to run the workers."""

    num_prefill: int
    num_decode: int
    chunk: int
    policy: str

    @property
    def name(self) -> str:
        """For people."""
        split = f"{self.num_prefill}:{self.num_decode}" if self.num_prefill else "colocated"
        return f"{split}, chunks of {self.chunk}, {self.policy}"


@dataclass(frozen=True)
class Trial:
    """A simulation to be run: one candidate on one stretch of the trace."""

    spec: ClusterSpec
    trace: list[TraceRequest]
    rate: float


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    slo_met: float
    missed: Mapping[str, int]
    """Requests that missed each objective."""


Runner = Callable[[Sequence[Trial]], list[Outcome]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Goal:
    """What is wanted, and how much work finding it may be."""

    profile: Profile
    config: TandemConfig
    num_workers: int
    attainment: float = 0.9
    """Share of the requests that must meet every objective."""
    seconds: float = 30.0
    """How long a stretch lasts at the rate at which it is served: long enough for queues to grow
    past the objectives. On the way up a third."""
    stretches: int = 5
    """On which a finalist is measured."""
    seed: int = 0
    requests: int = 60_000
    """About how many to simulate in all. Stretches are cut to keep within."""


@dataclass(frozen=True)
class Ranked:
    """A finalist: the highest rate that it sustained on each stretch, in requests per second."""

    candidate: Candidate
    rates: tuple[float, ...]
    low: float
    high: float
    """95 % interval of the mean, bootstrapped over the stretches."""

    @property
    def rate(self) -> float:
        """The mean."""
        return fmean(self.rates)


@dataclass(frozen=True)
class Limit:
    """What share of the requests meets the objectives if one thing were better."""

    what: str
    slo_met: float


@dataclass(frozen=True)
class Plan:
    """The answer, best first."""

    finalists: tuple[Ranked, ...]
    limits: tuple[Limit, ...]
    """Of the best one, a little above its rate; what helps most comes first."""
    slo_met_over: float
    """The share there, as things are."""
    missed: Mapping[str, int]
    trials: int
    stretch_seconds: float = 0.0
    """How long the stretches on which the best one was measured lasted at its rate."""

    @property
    def is_sure(self) -> bool:
        """Whether the best one's interval lies above all others'."""
        best, *others = self.finalists
        return all(other.high < best.low for other in others)


def candidates(goal: Goal) -> list[Candidate]:
    """Return every split of the workers with every chunk and policy."""
    splits = range(goal.num_workers if goal.profile.link is not None else 1)
    return [
        Candidate(num_prefill, goal.num_workers - num_prefill, chunk, policy)
        for num_prefill in splits
        for chunk in CHUNKS
        for policy in POLICIES
    ]


def make_plan(trace: list[TraceRequest], goal: Goal, run: Runner, say: Say) -> Plan:
    """Race the candidates. Raises `ConfigError` if none meets the objectives at any rate."""
    return _Race(trace, goal, run, say).plan()


def busy_rate(trace: Sequence[TraceRequest], profile: Profile, num_workers: int) -> float:
    """Return the requests per second that keep all workers busy if they decode in large batches."""
    cost, batch = profile.iteration, 16
    seconds = 0.0
    for request in trace:
        prompt = Work().plus_prompt(0, request.prompt_len)
        context = batch * (request.prompt_len + request.output_len // 2)
        step = cost.seconds(Work(decodes=batch, context=context)) / batch
        seconds += cost.seconds(prompt) + request.output_len * step
    return num_workers * len(trace) / seconds


class _Race:
    """One search; counts its trials."""

    def __init__(self, trace: list[TraceRequest], goal: Goal, run: Runner, say: Say) -> None:
        self._trace = trace
        self._goal = goal
        self._run = run
        self._say = say
        self._rng = Random(goal.seed)
        self._trials = 0

    def plan(self) -> Plan:
        finalists, passed = self._climb()
        ranked = [self._measure(candidate, passed) for candidate in finalists]
        ranked.sort(key=lambda entry: -entry.rate)
        if not ranked[0].rate:
            raise ConfigError(self._hopeless({finalists[0]: 0.0}))
        over, limits = self._limits(ranked[0])
        lasted = len(self._numbered(0, ranked[0].rate)) / ranked[0].rate
        return Plan(tuple(ranked), limits, over.slo_met, over.missed, self._trials, lasted)

    # ------------------------------------------------------------------ the race

    def _climb(self) -> tuple[list[Candidate], float]:
        """Raise the rate until few are left; return them and the last rate that they sustained."""
        left = candidates(self._goal)
        rate = _START * busy_rate(self._trace, self._goal.profile, self._goal.num_workers)
        lowest, highest, climbed = rate / _FAR, rate * _FAR, False
        rate = self._scout(left[0], rate, highest)
        while True:
            most = _RUNG_SHARE * self._goal.requests / len(left)
            stretch = self._stretch(min(rate * self._goal.seconds / 3, most), self._rng)
            outcomes = self._try([(c, rate, stretch) for c in left])
            met = {c: outcome.slo_met for c, outcome in zip(left, outcomes, strict=True)}
            staying = [c for c in left if met[c] >= self._goal.attainment]
            self._say(f"{rate:.3g} requests/s: {len(staying)} of {len(left)} candidates keep up")
            if not staying and not climbed:
                if rate < lowest:
                    raise ConfigError(self._hopeless(met))
                rate /= 2
                continue
            climbed = True
            if len(staying) <= _FINALISTS or rate > highest:
                best = sorted(left, key=lambda candidate: -met[candidate])[:_FINALISTS]
                return best, rate / RUNG
            left, rate = staying, rate * RUNG

    def _scout(self, candidate: Candidate, rate: float, highest: float) -> float:
        """Return the last rung that one candidate keeps up with, the first one if none: the best
        of all can do as much."""
        while rate < highest:
            most = _RUNG_SHARE * self._goal.requests / len(candidates(self._goal))
            stretch = self._stretch(min(rate * self._goal.seconds / 3, most), self._rng)
            if self._try([(candidate, rate, stretch)])[0].slo_met < self._goal.attainment:
                break
            rate *= RUNG
        return rate / RUNG

    def _hopeless(self, met: Mapping[Candidate, float]) -> str:
        best = max(met, key=lambda candidate: met[candidate])
        return (
            f"no candidate meets the objectives of {self._goal.attainment:.0%} of the requests at "
            f"any rate; the best ({best.name}) does for {met[best]:.1%}: relax --slo or "
            "--attainment"
        )

    # ------------------------------------------------------------------ the last ones

    def _measure(self, candidate: Candidate, passed: float) -> Ranked:
        """Find the highest rate that a finalist sustains on each stretch."""
        brackets = [Bracket(passed) for _ in range(self._goal.stretches)]
        while open_ := [i for i, bracket in enumerate(brackets) if not bracket.is_narrow]:
            wanted = [(candidate, rate := brackets[i].next, self._numbered(i, rate)) for i in open_]
            for i, outcome in zip(open_, self._try(wanted), strict=True):
                brackets[i].tried(outcome.slo_met >= self._goal.attainment)
        rates = tuple(bracket.low for bracket in brackets)
        interval = _bootstrap(rates, Random(self._goal.seed))
        self._say(f"{candidate.name}: {fmean(rates):.3g} requests/s")
        return Ranked(candidate, rates, *interval)

    def _limits(self, best: Ranked) -> tuple[Outcome, tuple[Limit, ...]]:
        """Make the winner's machine better in one respect at a time, a little above its rate."""
        spec, rate = self._spec(best.candidate), best.rate * _OVER
        stretch = self._numbered(0, rate)
        better = improvements(spec)
        trials = [Trial(spec, stretch, rate)] + [Trial(s, stretch, rate) for s in better.values()]
        over, *outcomes = self._run(trials)
        self._trials += len(trials)
        limits = [Limit(what, o.slo_met) for what, o in zip(better, outcomes, strict=True)]
        return over, tuple(sorted(limits, key=lambda limit: -limit.slo_met))

    # ------------------------------------------------------------------ trials

    def _try(self, wanted: Sequence[tuple[Candidate, float, list[TraceRequest]]]) -> list[Outcome]:
        self._trials += len(wanted)
        return self._run([Trial(self._spec(c), stretch, rate) for c, rate, stretch in wanted])

    def _spec(self, candidate: Candidate) -> ClusterSpec:
        config = with_policy(with_chunk(self._goal.config, candidate.chunk), candidate.policy)
        return ClusterSpec(
            self._goal.profile,
            config,
            candidate.num_prefill,
            candidate.num_decode,
            self._goal.seed,
        )

    def _numbered(self, number: int, rate: float) -> list[TraceRequest]:
        """Stretches that are the same for every finalist: of one number they begin together."""
        goal, rng = self._goal, Random(f"{self._goal.seed} {number}")
        most = _FINAL_SHARE * goal.requests / (goal.stretches * _TRIALS)
        return self._stretch(min(rate * goal.seconds, most), rng)

    def _stretch(self, requests: float, rng: Random) -> list[TraceRequest]:
        """A part of the trace as it is, so that its bursts and shared prefixes stay."""
        count = max(_FEWEST, min(round(requests), len(self._trace) // 2))
        start = int(rng.random() * max(0, len(self._trace) - count))
        return self._trace[start : start + count]


def _bootstrap(rates: Sequence[float], rng: Random, rounds: int = 1000) -> tuple[float, float]:
    """Return the 95 % interval of the mean, by drawing the stretches again and again."""
    means = sorted(fmean(rng.choices(rates, k=len(rates))) for _ in range(rounds))
    return means[int(0.025 * rounds)], means[int(0.975 * rounds)]
