"""The router, one promise at a time. FIELD's herding reports are tests here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from tandem.core.config import RouterConfig, RoutingPolicy
from tandem.core.errors import OverloadedError, UnavailableError
from tandem.core.prefix_events import PrefixEvents
from tandem.kvcache.hashing import chain_hashes
from tandem.router import Assignment, Router
from tandem.router.prefix_index import PrefixIndex

BLOCK = 16
POLICIES: list[RoutingPolicy] = ["round_robin", "least_loaded", "prefix_aware"]
DECODE = ["d0", "d1", "d2", "d3"]
PREFILL = ["p0", "p1"]


def make_router(
    policy: RoutingPolicy = "prefix_aware",
    *,
    prefill: Sequence[str] = PREFILL,
    decode: Sequence[str] = DECODE,
    seed: int = 0,
    max_in_flight: int = 1024,
    max_prefix_bonus_tokens: int = 2048,
    prefix_weight: float = 1.0,
    max_tracked_blocks: int = 65536,
) -> Router:
    config = RouterConfig(
        policy=policy,
        max_in_flight=max_in_flight,
        max_prefix_bonus_tokens=max_prefix_bonus_tokens,
        prefix_weight=prefix_weight,
        max_tracked_blocks=max_tracked_blocks,
    )
    router = Router(config, BLOCK, seed)
    router.set_members(prefill, decode)
    return router


def send(
    router: Router, name: str, tokens: Sequence[int], exclude: Sequence[str] = ()
) -> Assignment:
    return router.route(name, chain_hashes(tokens, BLOCK), len(tokens), exclude)


def end(router: Router, name: str) -> None:
    router.first_token(name)
    router.release(name)


def own_prompt(index: int, length: int = 200) -> list[int]:
    return [10_000 * (index + 1) + i for i in range(length)]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_burst_is_spread_before_any_worker_has_answered(policy: RoutingPolicy) -> None:
    router = make_router(policy)
    burst = [send(router, f"r{i}", own_prompt(i)) for i in range(40)]
    assert set(Counter(a.decode for a in burst).values()) == {10}
    assert set(Counter(a.prefill for a in burst).values()) == {20}
    assert [router.in_flight(name) for name in [*DECODE, *PREFILL]] == [10] * 4 + [20] * 2


@pytest.mark.parametrize("policy", ["least_loaded", "prefix_aware"])
def test_load_is_counted_in_tokens_not_only_in_requests(policy: RoutingPolicy) -> None:
    router = make_router(policy, decode=["d0", "d1"])
    long = send(router, "long", own_prompt(0, 4000))
    short = [send(router, f"r{i}", own_prompt(i + 1, 100)) for i in range(8)]
    assert long.decode not in {a.decode for a in short}
    assert long.prefill not in {a.prefill for a in short}


def test_a_shared_system_prompt_does_not_herd_to_one_decode_worker() -> None:
    router = make_router()
    system_prompt = list(range(1000))
    shares: Counter[str] = Counter()
    for i in range(400):
        shares[send(router, f"r{i}", system_prompt + own_prompt(i, 40)).decode] += 1
        if i >= 100:  # a hundred in flight; the oldest ends
            router.release(f"r{i - 100}")
    assert all(80 <= shares[name] <= 120 for name in DECODE), shares


def test_without_load_a_conversation_stays_where_its_prefix_is() -> None:
    router = make_router()
    history = own_prompt(0)
    first = send(router, "turn0", history)
    end(router, "turn0")
    for turn in range(1, 10):
        history = history + own_prompt(turn, 50)
        assert send(router, f"turn{turn}", history) == first
        end(router, f"turn{turn}")


@pytest.mark.parametrize(("bonus", "stays"), [(320, True), (318, False), (10**6, True)])
def test_prefix_bonus_is_bounded(bonus: int, stays: bool) -> None:
    router = make_router(decode=["d0", "d1"], max_prefix_bonus_tokens=bonus)
    prefix = own_prompt(0, 960)
    home = send(router, "warm", prefix).decode
    other = ({"d0", "d1"} - {home}).pop()
    end(router, "warm")
    send(router, "load", own_prompt(1, 63), exclude=[other])  # 63 + 256 tokens of load
    assert (send(router, "r", prefix).decode == home) is stays


def test_prefix_weight_scales_the_bonus() -> None:
    for weight, stays in ((1.0, True), (0.1, False)):
        router = make_router(decode=["d0", "d1"], prefix_weight=weight)
        prefix = own_prompt(0, 960)
        home = send(router, "warm", prefix).decode
        other = ({"d0", "d1"} - {home}).pop()
        end(router, "warm")
        send(router, "load", own_prompt(1, 63), exclude=[other])
        assert (send(router, "r", prefix).decode == home) is stays


def test_prefill_load_is_what_is_left_to_compute() -> None:
    router = make_router(prefill=["p0", "p1"], decode=["d0"])
    prefix = own_prompt(0, 1600)
    home = send(router, "warm", prefix).prefill
    router.release("warm")
    # Each needs only its last 16 tokens on `home`: many of them weigh less than one fresh prompt.
    for i in range(12):
        assert send(router, f"r{i}", prefix + own_prompt(i + 1, 16)).prefill == home


def test_what_its_decode_worker_has_a_prefill_worker_need_not_compute() -> None:
    """It fetches the KV, which is counted as a tenth of computing it."""
    router = make_router(prefill=["p0", "p1"], decode=["d0"])
    prefix = own_prompt(0, 1600)
    home = send(router, "warm", prefix).prefill
    end(router, "warm")
    other = ({"p0", "p1"} - {home}).pop()
    send(router, "r", prefix + own_prompt(1, 40), exclude=[str(home)])
    assert {view.name: view.tokens for view in router._prefill.workers}[other] == 40 + 160


def test_where_nobody_has_begun_a_prompt_it_is_not_counted_as_cached() -> None:
    """A decode worker has KV from the first token on; a prefill worker never has what its decode
    worker computed itself."""
    for computed, is_local in ((False, False), (True, True)):
        taken = set()
        for seed in range(20):
            router = make_router(decode=["d0", "d1"], seed=seed)
            prompt = own_prompt(0, 960)
            first = send(router, "r0", prompt, exclude=["p1", "d1"])
            if computed:
                router.first_token("r0", is_local=is_local)
            router.release("r0")
            assert first == ("p0", "d0")
            second = send(router, "r1", prompt)
            taken.add(second.prefill if computed else second.decode)
        assert len(taken) == 2, "chance did not decide"


def test_what_a_prefill_worker_had_before_stays_when_the_rest_was_computed_elsewhere() -> None:
    for seed in range(10):
        router = make_router(decode=["d0"], seed=seed)
        prefix = own_prompt(0, 960)
        home = send(router, "r0", prefix).prefill
        end(router, "r0")
        send(router, "r1", prefix + own_prompt(1, 320), exclude=[({*PREFILL} - {home}).pop() or ""])
        router.first_token("r1", is_local=True)
        router.release("r1")
        assert send(router, "r2", prefix + own_prompt(2, 320)).prefill == home


def test_prefill_load_ends_at_the_first_token_and_decode_load_at_release() -> None:
    router = make_router(prefill=["p0"], decode=["d0"])
    send(router, "r", own_prompt(0))
    assert (router.in_flight("p0"), router.in_flight("d0")) == (1, 1)
    router.first_token("r")
    router.first_token("r")
    assert (router.in_flight("p0"), router.in_flight("d0")) == (0, 1)
    router.release("r")
    router.release("r")
    router.first_token("r")
    assert (router.in_flight("p0"), router.in_flight("d0")) == (0, 0)


def test_ten_routers_that_see_the_same_do_not_take_the_same_worker() -> None:
    for policy in POLICIES:
        first = [send(make_router(policy, seed=seed), "r", own_prompt(0)) for seed in range(10)]
        assert len({a.decode for a in first}) >= 3, policy
        assert len({a.prefill for a in first}) == 2, policy


@pytest.mark.parametrize("policy", ["least_loaded", "prefix_aware"])
def test_ten_routers_do_not_herd_onto_the_one_idle_worker(policy: RoutingPolicy) -> None:
    shares: Counter[str] = Counter()
    for seed in range(10):
        router = make_router(policy, seed=seed)
        for i in range(12):  # its share of what the three busy workers have
            send(router, f"old{i}", own_prompt(i), exclude=["d0"])
        for name in DECODE[1:]:
            router.observe(name, running=40, waiting=0)
        router.observe("d0", running=0, waiting=0)
        for i in range(10):
            shares[send(router, f"new{i}", own_prompt(100 + i)).decode] += 1
    # 100 new requests; level would be 55 on each, so the idle one is due about 55 of them.
    assert 40 <= shares["d0"] <= 70, shares


def test_prefix_index_forgets_deeper_blocks_before_their_parents() -> None:
    index = PrefixIndex(capacity=10)
    old, new = chain_hashes(range(10), 1), chain_hashes(range(100, 104), 1)
    index.record(0, old)
    index.record(0, new)
    assert (index.match(0, old), index.match(0, new)) == (6, 4)


def test_other_routers_load_is_taken_from_reports() -> None:
    router = make_router("least_loaded", decode=["d0", "d1"])
    router.observe("d0", running=5, waiting=3)
    router.observe("stranger", running=5, waiting=3)
    assert send(router, "r0", own_prompt(0)).decode == "d1"
    router.observe("d1", running=9, waiting=3)
    assert send(router, "r9", own_prompt(9)).decode == "d0"


def test_a_report_of_this_routers_own_requests_is_not_counted_twice() -> None:
    router = make_router("least_loaded", decode=["d0", "d1"])
    for i in range(4):
        send(router, f"r{i}", own_prompt(i), exclude=["d1"])
    router.observe("d0", running=4, waiting=0)
    for i in range(4, 12):
        send(router, f"r{i}", own_prompt(i))
    assert (router.in_flight("d0"), router.in_flight("d1")) == (6, 6)


def test_refuses_early_when_every_decode_worker_is_full() -> None:
    router = make_router(decode=["d0", "d1"], max_in_flight=2)
    for i in range(4):
        send(router, f"r{i}", own_prompt(i))
    router.observe("d0", running=2, waiting=6)
    router.observe("d1", running=2, waiting=2)
    with pytest.raises(OverloadedError, match="2 requests in flight") as caught:
        send(router, "r4", own_prompt(4))
    assert caught.value.retry_after == 2.0
    assert sum(router.in_flight(name) for name in PREFILL) == 4, "a refused request left load"
    router.release("r0")
    send(router, "r4", own_prompt(4))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_full_decode_worker_gets_nothing_while_another_has_room(policy: RoutingPolicy) -> None:
    router = make_router(policy, decode=["d0", "d1"], max_in_flight=3)
    for i in range(3):
        send(router, f"r{i}", own_prompt(0), exclude=["d1"])
    assert [send(router, f"s{i}", own_prompt(0)).decode for i in range(3)] == ["d1"] * 3


def test_retry_hint_is_bounded() -> None:
    router = make_router(decode=["d0"], max_in_flight=1)
    send(router, "r0", own_prompt(0))
    router.observe("d0", running=0, waiting=10_000)
    with pytest.raises(OverloadedError) as caught:
        send(router, "r1", own_prompt(1))
    assert caught.value.retry_after == 30.0


def test_no_prefill_worker_means_local_prefill_and_no_decode_worker_is_unavailable() -> None:
    router = make_router(prefill=[])
    assert send(router, "r0", own_prompt(0)).prefill is None
    router.set_members(PREFILL, [])
    with pytest.raises(UnavailableError):
        send(router, "r1", own_prompt(1))
    router.set_members(PREFILL, DECODE)
    assert send(router, "r2", own_prompt(2), exclude=PREFILL).prefill is None
    with pytest.raises(UnavailableError):
        send(router, "r3", own_prompt(3), exclude=DECODE)
    assert {send(router, f"r{i}", own_prompt(i), exclude=["d0"]).decode for i in range(9)} == {
        "d1",
        "d2",
        "d3",
    }


def test_a_request_routed_again_leaves_its_old_workers() -> None:
    router = make_router()
    first = send(router, "r", own_prompt(0))
    assert first.prefill is not None
    second = send(router, "r", own_prompt(0), exclude=[first.decode])
    assert second.decode != first.decode
    assert router.in_flight(first.decode) == 0
    assert sum(router.in_flight(name) for name in PREFILL) == 1
    router.release("r")
    assert [router.in_flight(name) for name in [*DECODE, *PREFILL]] == [0] * 6


def test_reassigned_prefill_moves_its_load() -> None:
    router = make_router()
    first = send(router, "r", own_prompt(0)).prefill
    assert first is not None
    second = router.reassign_prefill("r", exclude=[first])
    assert second in set(PREFILL) - {first}
    assert (router.in_flight(first), router.in_flight(second)) == (0, 1)
    assert router.reassign_prefill("r", exclude=PREFILL) is None
    assert router.in_flight(second) == 0
    router.release("r")
    assert router.reassign_prefill("r", exclude=[]) is None
    assert [router.in_flight(name) for name in [*DECODE, *PREFILL]] == [0] * 6


def test_workers_that_stay_keep_their_load_and_those_that_return_start_from_zero() -> None:
    router = make_router(decode=["d0", "d1"])
    send(router, "r0", own_prompt(0), exclude=["d1"])
    send(router, "r1", own_prompt(1), exclude=["d0"])
    router.set_members(PREFILL, ["d0"])
    assert (router.in_flight("d0"), router.in_flight("d1")) == (1, 0)
    router.set_members(PREFILL, ["d0", "d1"])
    send(router, "r2", own_prompt(1), exclude=["d0"])
    router.release("r1")
    assert router.in_flight("d1") == 1, "a release of the old d1 was taken from the new one"


def test_round_robin_goes_round_and_skips_the_excluded() -> None:
    router = make_router("round_robin")
    names = [send(router, f"r{i}", own_prompt(0)).decode for i in range(8)]
    start = DECODE.index(names[0])
    assert names == [DECODE[(start + i) % 4] for i in range(8)]
    excluded = DECODE[(start + 8) % 4]
    assert send(router, "x", own_prompt(0), exclude=[excluded]).decode == DECODE[(start + 9) % 4]


@pytest.mark.parametrize(("capacity", "homes"), [(10, {"d0", "d1"}), (20, {"d0"})])
def test_memory_of_prefixes_is_bounded_and_forgets_the_oldest(
    capacity: int, homes: set[str]
) -> None:
    old, new = own_prompt(0, 10 * BLOCK), own_prompt(1, 10 * BLOCK)
    taken = set()
    for seed in range(20):
        router = make_router(decode=["d0", "d1"], max_tracked_blocks=capacity, seed=seed)
        for name, prompt in (("old", old), ("new", new)):
            send(router, name, prompt, exclude=["d1"])
            end(router, name)
        taken.add(send(router, "again", old).decode)
    assert taken == homes  # once forgotten, the two are equal and chance decides


def report_pace(router: Router, worker: str, seconds: float) -> None:
    router.observe_prefixes(worker, PrefixEvents(1, prompt_token_seconds=seconds))


@pytest.mark.parametrize("policy", ["least_loaded", "prefix_aware"])
def test_a_slow_prefill_worker_gets_what_it_can_do(policy: RoutingPolicy) -> None:
    """By the time that its tokens in flight take it, and the request's own: first nothing, then a
    third of what the fast one has."""
    router = make_router(policy)
    report_pace(router, "p0", 1e-3)
    report_pace(router, "p1", 3e-3)
    taken = [send(router, f"r{i}", own_prompt(i, 100)).prefill for i in range(80)]
    assert taken[:2] == ["p0", "p0"]
    assert 17 <= taken.count("p1") <= 23, taken.count("p1")


def test_a_prefix_on_a_slow_worker_is_worth_what_computing_it_takes_elsewhere() -> None:
    for slow, stays in ((2e-3, True), (40e-3, False)):
        router = make_router(decode=["d0"])
        prefix = own_prompt(0, 960)
        send(router, "r0", prefix, exclude=["p1"])
        router.release("r0")
        report_pace(router, "p0", slow)
        report_pace(router, "p1", 1e-3)
        placed = send(router, "r1", prefix + own_prompt(1, 160)).prefill
        assert (placed == "p0") is stays, slow


@pytest.mark.parametrize("seconds", [(1e-3, 1.1e-3), (1e-3, 0.0), (0.0, 0.0)])
def test_workers_of_about_one_pace_or_none_known_are_drawn_by_lot(
    seconds: tuple[float, float],
) -> None:
    taken = set()
    for seed in range(20):
        router = make_router(seed=seed)
        for worker, pace in zip(PREFILL, seconds, strict=True):
            report_pace(router, worker, pace)
        taken.add(send(router, "r", own_prompt(0)).prefill)
    assert taken == set(PREFILL)


def test_a_pace_is_forgotten_with_its_worker() -> None:
    router = make_router()
    report_pace(router, "p0", 1e-3)
    report_pace(router, "p1", 3e-3)
    router.set_members(["p0"], DECODE)
    router.set_members(PREFILL, DECODE)
    taken = [send(router, f"r{i}", own_prompt(i)).prefill for i in range(20)]
    assert taken.count("p1") == 10
