"""A prefix that everybody sends comes to be on many workers; one that nobody shares stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import sqrt
from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.config import RouterConfig
from tandem.kvcache.hashing import chain_hashes
from tandem.router import Router
from tandem.router.policies import MOST_CHARGED, SLACK, Candidates, PrefixAware
from tandem.router.pool import WorkerPool
from tandem.router.router import EXPECTED_OUTPUT_TOKENS

BLOCK = 16


def make_router(workers: int, seed: int = 0) -> Router:
    router = Router(RouterConfig(), BLOCK, seed)
    router.set_members([f"p{i}" for i in range(workers)], [f"d{i}" for i in range(workers)])
    return router


def end(router: Router, name: str) -> None:
    router.first_token(name)
    router.release(name)


def loads(pool: WorkerPool) -> dict[str, int]:
    return {view.name: view.tokens for view in pool.workers}


class Crowd:
    """Prompts of one shared prefix and tails of their own, that prefix being cached by one worker
    of each pool."""

    def __init__(self, router: Router, shared: int, tail: int) -> None:
        self._router, self._shared, self._tail, self._sent = router, list(range(shared)), tail, 0
        self.home = self.send()
        end(router, "r1")

    def send(self) -> tuple[str | None, str]:
        self._sent += 1
        own = [10_000 + self._tail * self._sent + i for i in range(self._tail)]
        prompt = self._shared + own
        return self._router.route(f"r{self._sent}", chain_hashes(prompt, BLOCK), len(prompt))


@given(
    workers=st.integers(2, 8),
    blocks=st.integers(16, 128),
    tail=st.integers(1, 64),
    in_flight=st.integers(1, 300),
    seed=st.integers(0, 9),
)
@settings(max_examples=30, deadline=None)
def test_no_worker_has_more_than_its_bound_of_work_for_a_shared_prefix(
    workers: int, blocks: int, tail: int, in_flight: int, seed: int
) -> None:
    """On the prefill pool, a request of w tokens to compute that comes for a prefix of S leads to
    at most (1 + SLACK) mean + 2 w + sqrt(2 w S N): to climb x tokens above the bound charges
    x² / 2 w, and at most N - 1 copies are paid with S each. On the decode pool, where a cached
    prompt weighs no less, the prefix never makes up for more than itself."""
    router = make_router(workers, seed)
    shared = BLOCK * blocks
    crowd = Crowd(router, shared, tail)
    new, whole = max(tail, BLOCK), shared + tail + EXPECTED_OUTPUT_TOKENS
    for number in range(2, 350):
        before, before_decode = loads(router._prefill), loads(router._decode)
        prefill, decode = crowd.send()
        copies = loads(router._prefill)[prefill] - before[prefill] > new
        if not copies:
            bound = (1 + SLACK) * sum(before.values()) / workers + 2 * new
            assert before[prefill] + new <= bound + sqrt(2 * new * shared * workers)
        mean = sum(before_decode.values()) / workers
        assert before_decode[decode] + whole <= mean + shared + whole
        if number > in_flight + 1:
            end(router, f"r{number - in_flight}")


@given(workers=st.integers(2, 8), in_flight=st.integers(32, 200), tail=st.integers(1, 32))
@settings(max_examples=15, deadline=None)
def test_a_crowd_with_short_tails_comes_to_be_spread_over_all_workers(
    workers: int, in_flight: int, tail: int
) -> None:
    """Nobody gets more than (1 + SLACK) times its share, and two of those in flight."""
    router = make_router(workers)
    crowd = Crowd(router, 1024, tail)
    taken: Counter[str | None] = Counter()
    for number in range(2, 1500):
        prefill, decode = crowd.send()
        if number > 700:
            taken.update((prefill, decode))
        if number > in_flight + 1:
            end(router, f"r{number - in_flight}")
    assert max(taken.values()) <= 799 * ((1 + SLACK) / workers + 2 / in_flight), taken


@given(workers=st.integers(2, 8), seed=st.integers(0, 99), others=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_a_conversation_without_pressure_stays_with_its_worker(
    workers: int, seed: int, others: int
) -> None:
    """Even beside a few short prompts of others on every worker."""
    router = make_router(workers, seed)
    for number in range(others * workers):
        prompt = [50_000 + 32 * number + i for i in range(32)]
        router.route(f"other{number}", chain_hashes(prompt, BLOCK), len(prompt))
    history = list(range(512))
    homes = set()
    for turn in range(40):
        homes.add(router.route("turn", chain_hashes(history, BLOCK), len(history)))
        end(router, "turn")
        history += [1000 + 64 * turn + i for i in range(64)]
    assert len(homes) == 1


def behind_a_busy_home(decode_workers: Callable[[int], str]) -> list[bool]:
    """Of eight turns of a conversation whose prefill worker is busy with another prompt: whether
    they go there. `decode_workers`: the only one in each turn."""
    router, prefill = make_router(4), [f"p{i}" for i in range(4)]
    router.set_members(prefill, ["d0"])
    history = list(range(1024))
    home = router.route("first", chain_hashes(history, BLOCK), len(history)).prefill
    end(router, "first")
    router.set_members([str(home)], ["d0"])
    busy = list(range(20_000, 20_900))
    router.route("busy", chain_hashes(busy, BLOCK), len(busy))
    stayed = []
    for turn in range(8):
        router.set_members(prefill, [decode_workers(turn)])
        history += range(30_000 + 16 * turn, 30_016 + 16 * turn)
        stayed.append(router.route("turn", chain_hashes(history, BLOCK), len(history))[0] == home)
        router.release("turn")
    return stayed


def test_a_long_conversation_waits_for_its_worker_rather_than_begin_anew() -> None:
    """Crowded or not: it is alone with its prefix, and to compute it again costs more."""
    assert behind_a_busy_home(lambda turn: f"d{turn + 1}") == [True] * 8


def test_it_does_not_wait_where_its_decode_worker_can_send_the_prefix_elsewhere() -> None:
    assert not any(behind_a_busy_home(lambda turn: "d0"))


def test_the_same_prompts_lead_to_the_same_decisions() -> None:
    def decisions() -> list[tuple[str | None, str]]:
        crowd = Crowd(make_router(5, seed=3), 1024, 16)
        return [crowd.send() for _ in range(300)]

    assert decisions() == decisions()


def test_memory_of_charges_is_bounded() -> None:
    policy = PrefixAware(Random(0), 1.0, 2048)
    for number in range(MOST_CHARGED + 500):
        crowded = Candidates(
            ["a", "b"],
            np.arange(2),
            np.array([400.0, 0.0]),
            np.array([1024.0, 0.0]),
            np.zeros(2),
            lambda index: 16.0,
            lambda index, number=number: number.to_bytes(8, "big"),
        )
        assert policy.choose(crowded) == 0
    assert len(policy._charges) == MOST_CHARGED
