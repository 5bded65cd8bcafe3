"""The simulated cluster: exact times on hand-made cases, and nothing lost on random ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iterations import make_bench
from tandem.scheduler.policies import POLICIES
from tandem.simulator import ClusterSpec, TraceRequest, simulate
from tandem.timeline.events import Timeline

MakeSpec = Callable[..., ClusterSpec]


def lines(recorder: Timeline, worker: str) -> list[str]:
    """The iterations of a worker, as `iterations.describe` writes them."""
    return [
        " ".join(f"{part.request}:{part.length}" for part in box.parts)
        for box in recorder.iterations
        if box.worker == worker
    ]


def test_one_request_on_one_pair_takes_what_the_profile_says(make_spec: MakeSpec) -> None:
    recorder = Timeline()
    report = simulate([TraceRequest(5.0, 8, 3)], make_spec(1, 1), {}, recorder)
    # To the decode worker, to the prefill worker, the prefill, back, and to the client.
    assert report.ttfts == [pytest.approx(0.001 + 0.001 + (0.010 + 0.008) + 0.001 + 0.001)]
    # Its last piece is ready with the prefill and takes 0.2 ms, less than the first token's way.
    assert report.exposed == [0.0]
    # Two decode steps of 11 ms.
    assert report.tpots == [pytest.approx(0.011)]
    assert report.seconds == pytest.approx(5.0 + report.ttfts[0] + 0.022)
    assert lines(recorder, "prefill-0") == ["r0:8"]
    assert lines(recorder, "decode-0") == ["r0:1", "r0:1"]
    assert report.kv_bytes == 800


def test_kv_is_sent_while_the_prompt_is_computed(make_spec: MakeSpec) -> None:
    spec = make_spec(1, 1, max_batch_tokens=64, chunk_size=64)
    recorder = Timeline()
    simulate([TraceRequest(0.0, 40, 2)], spec, {}, recorder)
    (sent,) = recorder.transfers
    (computed,) = (box for box in recorder.iterations if box.worker == "prefill-0")
    quarter = (computed.ended - computed.began) / 4
    assert sent.began == pytest.approx(computed.began + quarter)
    assert sent.ended == pytest.approx(computed.ended + 0.001)  # a quarter of 40 tokens is left


def test_a_slow_link_delays_the_second_token_and_not_the_first(make_spec: MakeSpec) -> None:
    spec = make_spec(1, 1)
    link = spec.profile.link.model_copy(update={"bytes_per_second": 1e4})
    slow = ClusterSpec(spec.profile.model_copy(update={"link": link}), spec.config, 1, 1)
    quick, waits = (simulate([TraceRequest(0.0, 8, 2)], each) for each in (spec, slow))
    assert quick.ttfts == waits.ttfts
    assert waits.exposed[0] > 0.06
    assert waits.tpots[0] == pytest.approx(quick.tpots[0] + waits.exposed[0])


def test_short_prompts_are_prefilled_where_they_decode(make_spec: MakeSpec) -> None:
    recorder = Timeline()
    simulate([TraceRequest(0.0, 2, 2)], make_spec(1, 1), {}, recorder)
    assert {box.worker for box in recorder.iterations} == {"decode-0"}


@pytest.mark.parametrize("policy", POLICIES)
def test_iterations_are_those_of_the_scheduler_itself(policy: str, make_spec: MakeSpec) -> None:
    """Colocated and all at once, the simulator must not add anything of its own."""
    shapes = [(12, 3), (5, 1), (20, 4), (3, 2), (9, 5)]
    recorder = Timeline()
    spec = make_spec(0, 1, policy=policy, batch_wait=0)
    simulate([TraceRequest(0.0, *shape) for shape in shapes], spec, {}, recorder)
    bench = make_bench(policy, num_blocks=64, batch_wait=0)
    bench.seconds = spec.profile.iteration.seconds
    bench.now = arrived = spec.profile.rpc_seconds
    bench.add("r0:", *shapes[0])
    first = bench.step()  # the worker was idle when it came
    for number, shape in enumerate(shapes[1:], start=1):
        bench.add(f"r{number}:", *shape).arrived_at = arrived
    assert lines(recorder, "decode-0") == [line for line in [first, *bench.finish()] if line]


def test_a_cached_prefix_is_not_computed_again(make_spec: MakeSpec) -> None:
    spec = make_spec(1, 1, num_blocks=512, max_batch_tokens=600, chunk_size=600)
    trace = [
        TraceRequest(0.0, 520, 2, hash_ids=(1, 2)),
        TraceRequest(9.0, 530, 2, hash_ids=(1, 3)),
        TraceRequest(18.0, 530, 2, hash_ids=(4, 5)),
    ]
    report = simulate(trace, spec)
    first, second, third = report.ttfts
    assert second < 0.1 * first
    assert third > 0.9 * first


def test_the_same_arguments_give_the_same_report(make_spec: MakeSpec) -> None:
    trace = [TraceRequest(i * 0.02, 3 + i * 7 % 40, 1 + i * 5 % 9) for i in range(40)]
    reports = [simulate(trace, make_spec(2, 2)).summary() for _ in range(2)]
    assert reports[0] == reports[1]


def test_requests_that_can_never_fit_are_refused_and_counted(make_spec: MakeSpec) -> None:
    report = simulate([TraceRequest(0.0, 300, 5), TraceRequest(0.1, 10, 2)], make_spec(1, 1))
    assert (report.num_finished, dict(report.refusals)) == (1, {"InvalidRequestError": 1})


def test_goodput_counts_requests_that_meet_every_objective(make_spec: MakeSpec) -> None:
    trace = [TraceRequest(0.0, 8, 3), TraceRequest(1.0, 30, 3)]
    report = simulate(trace, make_spec(1, 1), {"ttft": 0.03, "tpot": 0.02})
    assert (report.num_good, report.num_finished) == (1, 2)
    assert report.summary()["slo_met"] == 0.5


REQUESTS = st.builds(
    TraceRequest,
    arrival=st.floats(0, 0.5),
    prompt_len=st.integers(1, 60),
    output_len=st.integers(1, 20),
    hash_ids=st.just(()),
    tenant=st.sampled_from(["x", "y"]),
    priority=st.sampled_from([-10, 0, 10]),
    ttft_objective=st.sampled_from([0.0, 0.05, 1.0]),
)


@pytest.mark.parametrize("policy", POLICIES)
@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=25),
    prefill=st.integers(0, 2),
    decode=st.integers(1, 2),
    spare=st.integers(0, 30),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_request_ends_whatever_the_policy(
    policy: str,
    requests: list[TraceRequest],
    prefill: int,
    decode: int,
    spare: int,
    make_spec: MakeSpec,
) -> None:
    spec = make_spec(prefill, decode, num_blocks=20 + spare, policy=policy)
    requests.sort(key=lambda request: request.arrival)
    report = simulate(requests, spec)  # raises if a block is held to the end
    assert report.num_finished == len(requests)
    assert report.output_tokens == sum(request.output_len for request in requests)
    assert len(report.ttfts) == len(requests)
