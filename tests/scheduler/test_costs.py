"""What an iteration costs: the work in it, and the estimate learnt from measurements."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import ScheduledChunk, Sequence
from tandem.scheduler import costs
from tandem.scheduler.costs import CostEstimator, IterationCosts, Work, work_of


def cost(work: Work, slow: float = 1.0) -> float:
    """A machine: 5 ms, 0.2 ms per prompt token, 0.1 ms per decode, and attention."""
    tokens = 2e-4 * work.prompt_tokens + 1e-4 * work.decodes
    return slow * (5e-3 + tokens + 1e-8 * work.context + 2e-9 * work.attended)


def random_work(rng: Random) -> Work:
    decodes = rng.randrange(1, 40)
    work = Work(decodes=decodes, context=decodes * rng.randrange(10, 2000))
    if rng.random() < 0.5:
        work = work.plus_prompt(rng.randrange(0, 4000), rng.randrange(2, 500))
    return work


def step(work: Work, number: int) -> Work:
    """The decode step that follows so many later."""
    return work._replace(context=work.context + number * work.decodes)


def test_the_work_of_an_iteration() -> None:
    request = Request("r", tuple(range(100)), 100, SamplingParams(max_tokens=4))
    seq = Sequence(request, arrival=0)
    chunks = [ScheduledChunk(seq, 20, 10), ScheduledChunk(seq, 99, 1), ScheduledChunk(seq, 49, 1)]
    assert work_of(chunks) == Work(prompt_tokens=10, decodes=2, context=150, attended=250)
    assert Work().plus_prompt(20, 10) == Work(prompt_tokens=10, attended=250)


def test_the_estimate_finds_the_machine_and_follows_it_when_it_slows_down() -> None:
    rng, estimator = Random(0), CostEstimator()
    assert not estimator.trusted
    for slow in (1.0, 3.0):
        for _ in range(400):
            work = random_work(rng)
            estimator.measured(work, cost(work, slow))
        assert estimator.trusted
        for _ in range(50):
            work = random_work(rng)
            assert estimator.seconds(work) == pytest.approx(cost(work, slow), rel=0.02)


def test_noise_averages_out() -> None:
    rng, estimator = Random(1), CostEstimator()
    for _ in range(500):
        work = random_work(rng)
        estimator.measured(work, cost(work) * rng.uniform(0.8, 1.2))
    work = Work(decodes=16, context=16000).plus_prompt(0, 256)
    assert estimator.seconds(work) == pytest.approx(cost(work), rel=0.1)


def test_a_thousand_equal_iterations_do_not_blow_the_estimate_up() -> None:
    estimator = CostEstimator()
    for _ in range(1000):
        estimator.measured(Work(decodes=8, context=4096), 0.01)
    assert estimator.seconds(Work(decodes=8, context=4096)) == pytest.approx(0.01, rel=1e-3)
    assert 0 <= estimator.seconds(Work(decodes=9, context=4700)) < 0.02


def test_a_run_that_is_told_at_once_leaves_what_its_steps_leave_one_by_one() -> None:
    rng, at_once, stepwise = Random(5), CostEstimator(), CostEstimator()
    for _ in range(40):
        work = random_work(rng)
        run = [cost(work)]
        if not work.prompt_tokens:
            run += [cost(step(work, i)) for i in range(1, rng.randrange(1, 150))]
        at_once.measured_run(work, run)
        for i, seconds in enumerate(run):
            stepwise.measured(step(work, i), seconds)
        if rng.random() < 0.3:
            assert at_once.costs == stepwise.costs
    assert at_once.costs == stepwise.costs


def test_runs_are_taken_in_as_least_squares_with_forgetting_would_take_their_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(costs, "_FIRM", 1e-9)
    rng, estimator, measured = Random(6), CostEstimator(), []
    while len(measured) < 250:
        work = random_work(rng)
        steps = 1 if work.prompt_tokens else rng.randrange(1, 20)
        run = [(step(work, i), cost(step(work, i)) * rng.uniform(0.9, 1.1)) for i in range(steps)]
        estimator.measured_run(work, [seconds for _, seconds in run])
        measured += run
    weights = np.sqrt(0.98 ** np.arange(len(measured))[::-1])
    terms = np.array([(1, *work) for work, _ in measured], float) * weights[:, None]
    seconds = np.array([seconds for _, seconds in measured]) * weights
    expected = np.linalg.lstsq(terms, seconds, rcond=None)[0]
    assert min(expected) > 0
    assert list(estimator.costs) == pytest.approx(list(expected), rel=1e-5)


def test_the_longest_chunk_within_a_time() -> None:
    rng, estimator = Random(2), CostEstimator()
    for _ in range(400):
        work = random_work(rng)
        estimator.measured(work, cost(work))
    work = Work(decodes=4, context=400)
    length = estimator.most_prompt_tokens(work, 1000, 10_000, seconds=0.05)
    assert cost(work.plus_prompt(1000, length)) == pytest.approx(0.05, rel=0.02)
    assert estimator.most_prompt_tokens(work, 0, 64, seconds=10.0) == 64
    assert estimator.most_prompt_tokens(work, 0, 64, seconds=0.0) == 0


def test_what_a_prompt_costs_is_not_forgotten_while_only_decoding() -> None:
    rng, estimator = Random(0), CostEstimator()
    for _ in range(200):
        work = random_work(rng)
        estimator.measured(work, cost(work))
    for _ in range(5000):
        work = Work(decodes=rng.randrange(1, 40), context=rng.randrange(1, 40_000))
        estimator.measured(work, cost(work))
    work = Work(decodes=4, context=1000).plus_prompt(0, 200)
    assert estimator.seconds(work) == pytest.approx(cost(work), rel=0.05)


def test_a_seed_stands_in_for_what_was_never_measured() -> None:
    told = IterationCosts(5e-3, 2e-4, 0.0, 0.0, 2e-9)
    rng, estimator = Random(0), CostEstimator()
    for _ in range(100):
        work = Work(decodes=rng.randrange(1, 40), context=rng.randrange(1, 40_000))
        estimator.measured(work, cost(work))
    assert not estimator.knows_prompts
    estimator.seed(told)
    assert estimator.knows_prompts
    work = Work(decodes=4, context=1000).plus_prompt(0, 200)
    assert estimator.seconds(work) == pytest.approx(cost(work), rel=0.05)
    estimator.seed(IterationCosts(9.0, 9.0, 9.0, 9.0, 9.0))  # own knowledge is not overwritten
    assert estimator.seconds(work) == pytest.approx(cost(work), rel=0.05)


@pytest.mark.parametrize("seed", range(20))
def test_a_few_small_chunks_that_took_long_do_not_make_a_large_one_look_cheap(seed: int) -> None:
    """Else a decode worker that lends computes it at once, beside streams that wait for it."""
    rng, estimator = Random(seed), CostEstimator()
    estimator.seed(IterationCosts(0.0, 3e-4, 0.0, 0.0, 1e-9))
    steps = Work(decodes=1, context=500)
    for number in range(100):
        estimator.measured(step(steps, number), cost(step(steps, number)) * rng.uniform(0.9, 1.1))
    for _ in range(rng.randrange(1, 5)):
        small = steps.plus_prompt(rng.randrange(600), rng.randrange(16, 36))
        estimator.measured(small, cost(small) * rng.uniform(0.9, 1.6))
    large = steps.plus_prompt(512, 256)
    assert 0.5 < estimator.seconds(large) / cost(large) < 3
    assert all(each >= 0 for each in estimator.costs)
