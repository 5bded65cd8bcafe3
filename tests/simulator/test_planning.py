"""`tandem plan`: the same seed gives the same answer, and the answer is the one that is right."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tandem.cli import app
from tandem.commands.plan import describe
from tandem.core.errors import ConfigError
from tandem.simulator import ClusterSpec, TraceRequest, simulate
from tandem.simulator.bracket import Bracket
from tandem.simulator.planning import (
    Goal,
    Outcome,
    Plan,
    Trial,
    candidates,
    make_plan,
)
from tandem.simulator.profile import Profile, save_profile
from tandem.simulator.sweep import at_rate

MakeSpec = Callable[..., ClusterSpec]
TRACE = [TraceRequest(i * 0.1, 20 + i * 7 % 40, 4 + i * 5 % 9) for i in range(400)]
SLO = {"ttft": 0.5, "tpot": 0.1}


def run(trials: Sequence[Trial]) -> list[Outcome]:
    outcomes = []
    for trial in trials:
        report = simulate(at_rate(trial.trace, trial.rate), trial.spec, SLO)
        outcomes.append(Outcome(report.num_good / len(trial.trace), dict(report.missed)))
    return outcomes


def goal(spec: ClusterSpec, **changes: object) -> Goal:
    settings = {"num_workers": 2, "seconds": 6.0, "stretches": 2, **changes}
    return Goal(spec.profile, spec.config, **settings)  # type: ignore[arg-type]


def quiet(line: str) -> None:
    return


def test_the_same_seed_gives_the_same_plan(make_spec: MakeSpec) -> None:
    spec = make_spec(1, 1, num_blocks=2000)
    plans = [make_plan(TRACE, goal(spec), run, quiet) for _ in range(2)]
    assert plans[0] == plans[1]
    best = plans[0].finalists[0]
    assert best.low <= best.rate <= best.high
    assert best.rate == max(entry.rate for entry in plans[0].finalists)


def test_the_rate_of_a_plan_is_sustained_and_a_higher_one_is_not(make_spec: MakeSpec) -> None:
    spec = make_spec(1, 1, num_blocks=2000)
    tried: list[tuple[ClusterSpec, float, float]] = []

    def noted(trials: Sequence[Trial]) -> list[Outcome]:
        outcomes = run(trials)
        tried.extend((t.spec, t.rate, o.slo_met) for t, o in zip(trials, outcomes, strict=True))
        return outcomes

    plan = make_plan(TRACE, goal(spec), noted, quiet)
    for rate in plan.finalists[0].rates:
        assert any(at == rate and met >= 0.9 for _, at, met in tried)
        assert any(rate < at <= rate * 1.05 and met < 0.9 for _, at, met in tried)


def test_what_limits_a_plan_is_what_the_machine_lacks(make_spec: MakeSpec) -> None:
    spec = make_spec(1, 1, num_blocks=2000)
    slow_prompts = {"fixed": 0.001, "prompt_token": 0.004, "decode": 1e-5, "context": 0.0}
    cost = spec.profile.iteration.model_copy(update=slow_prompts)
    profile = spec.profile.model_copy(update={"iteration": cost})
    plan = make_plan(TRACE, Goal(profile, spec.config, 2, seconds=6.0, stretches=2), run, quiet)
    assert plan.limits[0].what == "prefill compute"
    assert plan.limits[0].slo_met > plan.slo_met_over


def test_objectives_that_nobody_can_meet_are_said_to_be_so(make_spec: MakeSpec) -> None:
    spec = make_spec(1, 1)
    cost = spec.profile.iteration.model_copy(update={"fixed": 10.0})
    slow = ClusterSpec(spec.profile.model_copy(update={"iteration": cost}), spec.config, 1, 1)
    with pytest.raises(ConfigError, match=r"no candidate meets the objectives of 90%"):
        make_plan(TRACE, goal(slow), run, quiet)


def test_a_stretch_that_no_rate_is_low_enough_for_ends_the_search_for_it() -> None:
    bracket, trials = Bracket(1.0), 0
    while not bracket.is_narrow:
        bracket.tried(sustained=False)
        trials += 1
    assert bracket.low == 0
    assert trials < 10
    bracket = Bracket(1.0)
    while not bracket.is_narrow:
        bracket.tried(sustained=True)
    assert 1 < bracket.low < 16


def test_fewer_requests_are_simulated_where_that_is_asked_for(make_spec: MakeSpec) -> None:
    spec, counted = make_spec(1, 1, num_blocks=2000), []

    def noted(trials: Sequence[Trial]) -> list[Outcome]:
        counted.extend(len(trial.trace) for trial in trials)
        return run(trials)

    make_plan(TRACE, goal(spec, seconds=60.0, requests=10_000), noted, quiet)
    assert sum(counted) <= 10_000 * 1.2


def test_without_a_link_only_colocated_serving_is_considered(make_spec: MakeSpec) -> None:
    spec = make_spec(1, 1)
    unlinked = spec.profile.model_copy(update={"link": None})
    alone = candidates(Goal(unlinked, spec.config, 4))
    assert {candidate.num_prefill for candidate in alone} == {0}
    both = candidates(Goal(spec.profile, spec.config, 4))
    assert {candidate.num_prefill for candidate in both} == {0, 1, 2, 3}


def test_the_command_says_the_answer_and_how_sure_it_is(
    tmp_path: Path, profile: Profile, make_spec: MakeSpec
) -> None:
    trace, machine = tmp_path / "t.jsonl", tmp_path / "machine.json"
    lines = ({"arrival": r.arrival, "prompt": r.prompt_len, "output": r.output_len} for r in TRACE)
    trace.write_text("\n".join(map(json.dumps, lines)))
    save_profile(profile.model_copy(update={"num_blocks": 2000}), machine)
    command = ["plan", "--trace", str(trace), "--profile", str(machine), "--workers", "1"]
    command += ["--seconds", "4", "--stretches", "2", "--jobs", "1"]
    shown = CliRunner().invoke(app, [*command, "--slo", "ttft=0.5"])
    assert shown.exit_code == 0, shown.output
    for part in ("colocated", "per worker", "95 % interval", "What limits it", "tandem serve"):
        assert part in shown.output
    wrong = CliRunner().invoke(app, [*command, "--slo", "speed=1"])
    assert isinstance(wrong.exception, ConfigError)
    assert "ttft, tpot, itl" in wrong.exception.message


def test_intervals_that_overlap_are_not_told_apart(make_spec: MakeSpec) -> None:
    spec = make_spec(1, 1, num_blocks=2000)
    plan = make_plan(TRACE, goal(spec), run, quiet)
    first = plan.finalists[0]
    tie = Plan((first, first), plan.limits, plan.slo_met_over, plan.missed, plan.trials)
    assert not tie.is_sure
    assert "not told apart" in describe(tie, goal(spec), 1.0)
    assert asdict(tie)["finalists"][0]["rates"] == first.rates
