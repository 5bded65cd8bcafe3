"""`tandem profile`: the fit finds the costs that made the times, and the file says them again."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tandem.core.config import TandemConfig
from tandem.core.errors import ConfigError, UnavailableError
from tandem.profiler.experiments import Prompts, _between, decode_batch, lone_iterations
from tandem.profiler.fit import FitError, Sample, fit_link, fit_samples
from tandem.profiler.measure import Measurements, lone_prompts
from tandem.profiler.stream import Endpoint, Stream, complete
from tandem.profiler.target import Done, Target, check_target
from tandem.scheduler.costs import Work
from tandem.simulator import Profile, load_profile
from tandem.simulator.machines import Machine, WorkerTime
from tandem.simulator.profile import IterationCost, SharedMachine, save_profile
from tandem.v1 import cluster_pb2

COSTS = {
    "fixed": 0.004, "prompt": 0.002, "prompt_token": 3e-4, "decode": 5e-5, "beyond_knee": 0.0,
    "context": 2e-7, "attended": 1e-8, "gateway": 0.003, "rpc": 0.001,
}  # fmt: skip
PROFILE = {
    "name": "p",
    "source": "test",
    "iteration": {"fixed": 0.01, "prompt_token": 1e-3, "decode": 1e-3, "context": 0.0},
    "num_blocks": 8,
    "max_model_len": 64,
}


def samples(noise: float = 0.0, knee: int = 0, **costs: float) -> list[Sample]:
    """What the experiments measure on a machine with `COSTS`, but for `costs`."""
    rng, config, found = random.Random(1), TandemConfig(), []
    for length in (8, 16, 32, 64, 128, 256, 512, 1024):
        works = lone_iterations(config, "prefill", length)
        found.append(Sample(1.0, works, requests=1, messages=4 if length > 32 else 2))
    for size, context in ((1, 16), (2, 16), (4, 16), (8, 16), (16, 16), (1, 384), (4, 384)):
        found.append(Sample(1.0, (Work(decodes=size, context=size * context),)))
    timed = []
    for sample in found:
        sizes = sample.sizes(knee)
        all_costs = (COSTS | costs).values()
        seconds = sum(cost * size for cost, size in zip(all_costs, sizes, strict=True))
        timed.append(
            Sample(
                seconds * (1 + rng.gauss(0, noise)),
                sample.iterations,
                sample.requests,
                sample.messages,
            )
        )
    return timed


def test_the_fit_finds_the_costs_that_made_the_times() -> None:
    fit = fit_samples(samples())
    assert fit.costs == pytest.approx(COSTS, rel=1e-3)
    assert fit.error_max < 1e-6


def test_another_profile_draws_other_prompts() -> None:
    """Or it would find those of the first in the prefix cache."""
    assert Prompts(1000).draw(50) != Prompts(1000).draw(50)


def test_the_gap_in_which_the_last_stream_began_is_not_a_step() -> None:
    early, late = Stream(), Stream()
    early.tokens[:] = [0.0, 0.5, 0.6, 0.7]  # beside the prompt of the other until 0.5
    late.tokens[:] = [0.5, 0.6, 0.7]
    batch = _between([[1], [2]], [early, late], [1, 1])
    assert batch.gaps == pytest.approx((0.1, 0.1, 0.1))


@pytest.mark.parametrize("knee", [4, 8])
def test_the_fit_finds_the_batch_size_from_which_sequences_cost_more(knee: int) -> None:
    fit = fit_samples(samples(knee=knee, beyond_knee=5e-4))
    assert fit.knee == knee
    assert fit.costs == pytest.approx(COSTS | {"beyond_knee": 5e-4}, rel=1e-3)
    cost = IterationCost(fixed=0.01, prompt_token=0, decode=1e-3, context=0, knee=4, beyond_knee=1)
    assert cost.seconds(Work(decodes=4)) == pytest.approx(0.014)
    assert cost.seconds(Work(decodes=6)) == pytest.approx(2.016)


def test_noise_makes_no_cost_negative_and_is_told() -> None:
    fit = fit_samples(samples(noise=0.05))
    assert all(cost >= 0 for cost in fit.costs.values())
    assert 0.005 < fit.error_p50 < 0.1
    assert fit.costs["prompt_token"] == pytest.approx(COSTS["prompt_token"], rel=0.15)
    with pytest.raises(FitError, match="nothing was measured"):
        fit_samples([])


def test_links_cost_bytes_and_pieces() -> None:
    measured = [(p, size, p * 1e-4 + size / 1e9) for p, size in ((4, 1e5), (4, 1e6), (16, 8e6))]
    assert fit_link(measured) == pytest.approx((1e9, 1e-4))
    with pytest.raises(FitError, match="no KV"):
        fit_link([])


def test_a_lone_prompt_is_cut_as_the_scheduler_cuts_it() -> None:
    config = TandemConfig.model_validate({"scheduler": {"chunk_size": 100}})
    works = lone_iterations(config, "decode", 250)
    assert [work.prompt_tokens for work in works] == [100, 100, 50]
    assert works[2].attended == 50 * 200 + 50 * 50 // 2
    waits = TandemConfig.model_validate({"scheduler": {"policy": "static_batching"}})
    with pytest.raises(ConfigError, match="profile with another"):
        lone_iterations(waits, "decode", 8)


@pytest.mark.parametrize("name", ["machine.yaml", "machine.json"])
def test_a_profile_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    profile = Profile.model_validate(
        PROFILE
        | {
            "link": {"bytes_per_second": 1e9, "kv_bytes_per_token": 100},
            "shared": {"workers": 2, "prefill": 1.2, "decode": 1.1},
            "measured": {
                "date": "2026-01-01",
                "machine": {"cpu": "x"},
                "versions": {"torch": "1"},
                "model": "m",
                "samples": 3,
                "fit_error_p50": 0.01,
                "fit_error_max": 0.02,
            },
        }
    )
    save_profile(profile, tmp_path / name)
    assert load_profile(tmp_path / name) == profile
    with pytest.raises(ConfigError, match="cannot be written"):
        save_profile(profile, tmp_path / "missing" / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_blocks": 0}, "num_blocks"),
        ({"shared": {"workers": 2, "prefill": 0.5}}, r"shared\.prefill"),
        ({"iteration": {**PROFILE["iteration"], "fixed": 0}}, r"iteration\.fixed"),  # type: ignore[dict-item]
        ({"colour": 1}, "colour"),
    ],
)
def test_a_wrong_profile_names_the_field(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(PROFILE | change))
    with pytest.raises(ConfigError, match=message):
        load_profile(path)


def test_a_neighbour_that_computes_makes_iterations_longer() -> None:
    cost = Profile.model_validate(PROFILE).iteration
    shared, machine = SharedMachine(workers=2, prefill=1.5, decode=1.25), Machine()
    one = WorkerTime(cost, shared, machine, "prefill", 0)
    two = WorkerTime(cost, shared, machine, "decode", 1)
    step = Work(decodes=1)
    assert one.begin(step) == pytest.approx(0.011)
    assert two.begin(step) == pytest.approx(0.011 * 1.25)
    two.end()
    one.end()
    assert two.begin(step) == pytest.approx(0.011)


def test_jitter_follows_from_worker_and_number_alone() -> None:
    jitter = (-0.002, 0.0, 0.002)
    cost = Profile.model_validate(PROFILE).iteration.model_copy(update={"jitter": jitter})
    times = [WorkerTime(cost, SharedMachine(), Machine(), "decode", seed) for seed in (1, 1, 2)]
    drawn = [[time.begin(Work(decodes=1)) for _ in range(300)] for time in times]
    assert drawn[0] == drawn[1] != drawn[2]
    for deviation in jitter:
        share = sum(abs(t - 0.011 - deviation) < 1e-9 for t in drawn[0]) / 300
        assert 0.2 < share < 0.5


def status(*workers: tuple[int, int, int]) -> cluster_pb2.ClusterStatus:
    """Workers as (role, state, running)."""
    return cluster_pb2.ClusterStatus(
        workers=[
            cluster_pb2.WorkerStatus(name=f"w{i}", role=role, state=state, running=running)
            for i, (role, state, running) in enumerate(workers)
        ]
    )


P, D = cluster_pb2.ROLE_PREFILL, cluster_pb2.ROLE_DECODE
READY, STARTING = cluster_pb2.WORKER_STATE_READY, cluster_pb2.WORKER_STATE_STARTING


def test_a_cluster_that_cannot_be_measured_is_refused_with_the_reason() -> None:
    config = TandemConfig()
    good = check_target(config, "c:1", "g:2", status((P, READY, 0), (D, READY, 0)))
    assert good.prefill is not None
    assert (good.endpoint.host, good.endpoint.port) == ("g", 2)
    for wrong, message in (
        (status((D, STARTING, 0)), "w0 is not ready"),
        (status((D, READY, 3)), "w0 is serving"),
        (status((D, READY, 0), (D, READY, 0)), "0 prefill and 2 decode workers"),
        (status(), "0 prefill and 0 decode"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_target(config, "c:1", "g:2", wrong)
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        check_target(config, "c:1", "nowhere", status((D, READY, 0)))


@asynccontextmanager
async def gateway(answer: str) -> AsyncIterator[Endpoint]:
    """An HTTP server that streams one token per event for ever, or says `answer`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        wanted = json.loads(await reader.readexactly(length))["max_tokens"]
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        if answer:
            writer.write(answer.encode() + b"\n")
            wanted = 0
        for _ in range(wanted):
            writer.write(b'2a\r\ndata: {"choices": [{"token_ids": [5]}]}\n\n\r\n')
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield Endpoint("127.0.0.1", server.sockets[0].getsockname()[1], "m")


class Counted(Target):
    """A cluster whose decode worker says, prompt after prompt, what it has done for it."""

    def __init__(self, endpoint: Endpoint, *prompts: Done) -> None:
        good = check_target(TandemConfig(), "c:1", "g:2", status((P, READY, 0), (D, READY, 0)))
        super().__init__("c:1", endpoint, good.config, good.decode, good.prefill)
        nothing = Done(0, 0, 0)
        self.__dict__["answers"] = iter([done for each in prompts for done in (nothing, each)])

    @property
    def layer_groups(self) -> int:
        return 3

    async def done(self) -> Done:
        return next(self.__dict__["answers"])


SENT, MOVED, HERE = Done(4e5, 1e-3, 0), Done(1e5, 1e-4, 40), Done(0, 0, 64)


async def test_a_prompt_counts_for_the_worker_that_computed_it_all() -> None:
    found = Measurements()
    async with gateway("") as endpoint:
        target = Counted(endpoint, SENT, HERE, MOVED, SENT, SENT)
        await lone_prompts(target, Prompts(100), 64, found)
    assert [sample.messages for sample in found.samples] == [4, 2]
    assert found.wire == [(3, 4e5, 1e-3)] * 3
    assert found.sent_tokens == 3 * 64
    assert set(found.remote) == {64}


async def test_prompts_that_always_move_say_what_to_do() -> None:
    async with gateway("") as endpoint:
        target = Counted(endpoint, *[MOVED] * 5)
        with pytest.raises(FitError, match=r"lending\.mode=off"):
            await lone_prompts(target, Prompts(100), 64, Measurements())


async def test_a_stream_notes_when_each_token_came() -> None:
    async with gateway("") as endpoint:
        stream = await complete(endpoint, [1, 2], 5)
    assert len(stream.tokens) == 5
    assert stream.sent < stream.tokens[0] <= stream.tokens[4]


async def test_a_batch_decodes_until_it_is_enough_and_is_then_dropped() -> None:
    async with gateway("") as endpoint:
        batch = await decode_batch(endpoint, [[1] * 16, [2] * 16], 100_000)
    assert batch.work.decodes == 2
    assert batch.work.context > 2 * 16
    assert batch.mean > 0


async def test_errors_of_the_gateway_are_passed_on() -> None:
    async with gateway('{"error": "no such model"}') as endpoint:
        with pytest.raises(UnavailableError, match=r"0 of 5 tokens came.*no such model"):
            await complete(endpoint, [1], 5)
    with pytest.raises(UnavailableError, match="does not answer"):
        await complete(endpoint, [1], 5)
