"""A crowd behind one system prompt, simulated: nearly all of it is found cached, by several."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

from tandem.core.config import TandemConfig
from tandem.simulator import ClusterSpec, TraceRequest, load_profile, simulate
from tandem.timeline.events import Timeline

PROFILE = Path(__file__).parents[2] / "docs/profiles/roofline-8b.yaml"


def test_short_tails_of_a_shared_prompt_are_spread_and_still_hit() -> None:
    """Although one worker alone has the prompt when the crowd comes."""
    rng, at, trace = Random(0), 0.0, []
    for number in range(1500):
        trace.append(TraceRequest(at, 2064, 4, (0, 1, 2, 3, 10 + number)))
        at += rng.expovariate(400) if number else 1.0
    config = TandemConfig.model_validate({"lending": {"mode": "off"}})
    timeline = Timeline()
    report = simulate(trace, ClusterSpec(load_profile(PROFILE), config, 4, 4), recorder=timeline)
    assert report.num_finished == len(trace)
    prompts: Counter[str] = Counter()
    computed = 0
    for iteration in timeline.iterations:
        if iteration.worker.startswith("prefill"):
            prompts[iteration.worker] += len(iteration.parts)
            computed += sum(part.length for part in iteration.parts)
    assert computed < 0.02 * sum(request.prompt_len for request in trace)
    assert max(prompts.values()) <= 1.6 * prompts.total() / 4, prompts


def test_each_of_many_system_prompts_is_computed_hardly_more_than_once() -> None:
    """When a crowd comes for all of them at once: copies are fetched from decode workers, and none
    is made because others are being made."""
    rng, at, trace = Random(1), 0.0, []
    for number in range(1500):
        system = number if number < 16 else rng.randrange(16)
        hashes = (*(100 * system + part for part in range(4)), 10**6 + number)
        trace.append(TraceRequest(at, 2176, 4, hashes))
        at += 0.2 if number < 16 else rng.expovariate(300)
    config = TandemConfig.model_validate({"lending": {"mode": "off"}})
    timeline = Timeline()
    simulate(trace, ClusterSpec(load_profile(PROFILE), config, 4, 8), recorder=timeline)
    computed: Counter[str] = Counter()
    for iteration in timeline.iterations:
        if iteration.worker.startswith("prefill"):
            computed.update({part.request: part.length for part in iteration.parts})
    assert sum(tokens > 1024 for tokens in computed.values()) <= 16 + 2
