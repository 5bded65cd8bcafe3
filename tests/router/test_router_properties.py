"""Whatever happens to the members and the requests, the router's counts stay true."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tandem.core.config import RouterConfig, RoutingPolicy
from tandem.core.errors import OverloadedError, UnavailableError
from tandem.kvcache.hashing import chain_hashes
from tandem.router import Router
from tandem.router.prefix_index import PrefixIndex

BLOCK = 4
MAX_IN_FLIGHT = 3
PREFILL = ["p0", "p1", "p2"]
DECODE = ["d0", "d1", "d2"]
POLICIES: list[RoutingPolicy] = ["round_robin", "least_loaded", "prefix_aware"]
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=20)
EXCLUDED = st.sets(st.sampled_from(PREFILL + DECODE), max_size=3)
NAMES = st.sampled_from([f"r{i}" for i in range(12)])


class RouterMachine(RuleBasedStateMachine):
    """The model: which request is on which worker of the present membership."""

    @initialize(policy=st.sampled_from(POLICIES), seed=st.integers(0, 99))
    def start(self, policy: RoutingPolicy, seed: int) -> None:
        config = RouterConfig(policy=policy, max_in_flight=MAX_IN_FLIGHT, max_tracked_blocks=6)
        self.router = Router(config, BLOCK, seed)
        self.members: set[str] = set()
        self.prefill: dict[str, str] = {}
        self.decode: dict[str, str] = {}
        self.change_members({"p0", "d0", "d1"})

    @rule(members=st.sets(st.sampled_from(PREFILL + DECODE)))
    def change_members(self, members: set[str]) -> None:
        self.router.set_members(members & set(PREFILL), members & set(DECODE))
        self.members = members
        self.prefill = {r: w for r, w in self.prefill.items() if w in members}
        self.decode = {r: w for r, w in self.decode.items() if w in members}

    @rule(name=NAMES, prompt=PROMPTS, exclude=EXCLUDED)
    def route(self, name: str, prompt: list[int], exclude: set[str]) -> None:
        self.forget(name)
        decode = self.members & set(DECODE) - exclude
        on = list(self.decode.values())
        full = {worker for worker in decode if on.count(worker) >= MAX_IN_FLIGHT}
        try:
            assigned = self.router.route(name, chain_hashes(prompt, BLOCK), len(prompt), exclude)
        except UnavailableError:
            assert not decode
            return
        except OverloadedError:
            assert decode
            assert full == decode
            return
        assert assigned.decode in decode - full
        self.decode[name] = assigned.decode
        self.check_prefill(name, assigned.prefill, exclude)

    @rule(name=NAMES, exclude=EXCLUDED)
    def reassign(self, name: str, exclude: set[str]) -> None:
        if name in self.decode:
            self.prefill.pop(name, None)
            self.check_prefill(name, self.router.reassign_prefill(name, exclude), exclude)

    def check_prefill(self, name: str, prefill: str | None, exclude: set[str]) -> None:
        eligible = self.members & set(PREFILL) - exclude
        if prefill is None:
            assert not eligible
        else:
            assert prefill in eligible
            self.prefill[name] = prefill

    @rule(name=NAMES)
    def first_token(self, name: str) -> None:
        self.router.first_token(name)
        self.prefill.pop(name, None)

    @rule(name=NAMES)
    def release(self, name: str) -> None:
        self.router.release(name)
        self.forget(name)

    def forget(self, name: str) -> None:
        self.prefill.pop(name, None)
        self.decode.pop(name, None)

    @rule(
        worker=st.sampled_from(PREFILL + DECODE),
        running=st.integers(0, 9),
        waiting=st.integers(0, 9),
    )
    def observe(self, worker: str, running: int, waiting: int) -> None:
        self.router.observe(worker, running, waiting)

    @invariant()
    def counts_are_true(self) -> None:
        on = [*self.prefill.values(), *self.decode.values()]
        for worker in PREFILL + DECODE:
            assert self.router.in_flight(worker) == on.count(worker), worker

    def teardown(self) -> None:
        if not hasattr(self, "router"):
            return
        for i in range(12):
            self.router.release(f"r{i}")
        for pool in (self.router._prefill, self.router._decode):
            for view in pool.workers:
                assert (view.requests, view.tokens, view.unreported_tokens) == (0, 0, 0)


TestRouterMachine = RouterMachine.TestCase
TestRouterMachine.settings = settings(max_examples=100, stateful_step_count=40)


@given(
    lengths=st.lists(st.integers(1, 300), min_size=2, max_size=40),
    shared=st.integers(0, 300),
    bonus=st.integers(0, 400),
    weight=st.floats(0, 2),
    seed=st.integers(0, 9),
)
def test_no_worker_is_ahead_by_more_than_the_bonus_and_one_request(
    lengths: list[int], shared: int, bonus: int, weight: float, seed: int
) -> None:
    config = RouterConfig(max_prefix_bonus_tokens=bonus, prefix_weight=weight)
    router = Router(config, BLOCK, seed)
    router.set_members([], DECODE)
    for index, length in enumerate(lengths):
        prompt = [1] * shared + [1000 * (index + 1) + i for i in range(length)]
        router.route(f"r{index}", chain_hashes(prompt, BLOCK), len(prompt))
        loads = [view.tokens for view in router._decode.workers]
        heaviest = shared + max(lengths) + 256
        assert max(loads) - min(loads) <= heaviest + weight * bonus


@given(
    chains=st.lists(
        st.tuples(PROMPTS, st.integers(0, 10), st.sampled_from(["record", "look", "forget"])),
        max_size=30,
    ),
    capacity=st.integers(1, 12),
)
def test_prefix_index_is_bounded_and_keeps_the_latest_run(
    chains: list[tuple[list[int], int, str]], capacity: int
) -> None:
    index = PrefixIndex(capacity)
    for tokens, worker, event in chains:
        hashes = chain_hashes(tokens, 2)
        if event == "record":
            index.record(worker, hashes)
            assert index.match(worker, hashes) == min(len(hashes), capacity)
        elif event == "forget":
            index.forget(worker)
            assert index.match(worker, hashes) == 0
        assert index.num_known(worker) <= capacity
        matches = [index.match(number, hashes) for number in range(11)]
        assert index.depths(hashes, 11).tolist() == matches
    for worker in range(11):
        index.forget(worker)
    assert index._holders == {}, "hashes that nobody holds are kept"


@given(
    prompts=st.lists(PROMPTS, min_size=1, max_size=20),
    policy=st.sampled_from(POLICIES),
    seed=st.integers(0, 99),
)
def test_same_seed_same_decisions_in_whatever_order_members_are_named(
    prompts: list[list[int]], policy: RoutingPolicy, seed: int
) -> None:
    def decisions(prefill: list[str], decode: list[str]) -> list[tuple[str | None, str]]:
        router = Router(RouterConfig(policy=policy), BLOCK, seed)
        router.set_members(prefill, decode)
        return [
            router.route(f"r{i}", chain_hashes(p, BLOCK), len(p)) for i, p in enumerate(prompts)
        ]

    assert decisions(PREFILL, DECODE) == decisions(PREFILL[::-1], DECODE[::-1])
