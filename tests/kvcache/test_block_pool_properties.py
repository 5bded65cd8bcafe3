"""Any sequence of operations on the pool agrees with a model that keeps plain sets."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tandem.core.errors import IntegrityError
from tandem.kvcache.block_pool import BlockPool, OutOfBlocksError
from tandem.kvcache.hashing import chain_hashes

NUM_BLOCKS = 9
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=6)  # few values: prefixes collide
PICK = st.integers(0, 10**6)


@dataclass
class Holding:
    """What one request has: its block table, its chain, how much of it is published."""

    tokens: list[int]
    blocks: list[int]
    num_published: int = 0
    legs: dict[str, list[int]] = field(default_factory=dict)


class PoolMachine(RuleBasedStateMachine):
    """Requests of block size 1 come, share, publish, transfer and go in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, 1)
        self.requests: dict[str, Holding] = {}
        self.orphans: dict[str, list[int]] = {}  # transfer holds whose request is gone
        self.content: dict[int, list[int]] = {}  # block -> prefix that its owner computed in it
        self.names = 0

    def name(self, kind: str) -> str:
        self.names += 1
        return f"{kind}{self.names}"

    def pick(self, pick: int) -> tuple[str, Holding]:
        name = sorted(self.requests)[pick % len(self.requests)]
        return name, self.requests[name]

    @rule(tokens=PROMPTS)
    def admit(self, tokens: list[int]) -> None:
        name = self.name("r")
        matched = self.pool.match_prefix(chain_hashes(tokens, 1))
        for depth, block in enumerate(matched):
            assert self.content[block] == tokens[: depth + 1], "found a block of another prefix"
        free_before = self.pool.num_free
        missing = len(tokens) - len(matched)
        fits = free_before - self.pool.num_unheld(matched) >= missing
        if not fits:
            self.pool.share(matched, name)
            try:
                self.pool.allocate(missing, name)
                raise AssertionError("allocated blocks that were not there")
            except OutOfBlocksError:
                self.pool.release(matched, name)
            assert self.pool.num_free == free_before
            return
        self.pool.share(matched, name)
        fresh = self.pool.allocate(missing, name)
        assert not {b for h in self.requests.values() for b in h.blocks} & set(fresh)
        assert not {b for blocks in self.orphans.values() for b in blocks} & set(fresh)
        blocks = matched + fresh
        for depth, block in enumerate(blocks):
            self.content[block] = tokens[: depth + 1]
        self.requests[name] = Holding(tokens, blocks, len(matched))

    @precondition(lambda self: self.requests)
    @rule(pick=PICK, count=st.integers(1, 6))
    def publish(self, pick: int, count: int) -> None:
        _, holding = self.pick(pick)
        hashes = chain_hashes(holding.tokens, 1)
        end = min(holding.num_published + count, len(hashes))
        for depth in range(holding.num_published, end):
            parent = hashes[depth - 1] if depth else b""
            self.pool.publish(holding.blocks[depth], hashes[depth], parent)
        holding.num_published = end
        assert len(self.pool.match_prefix(hashes)) >= 1

    @precondition(lambda self: self.requests)
    @rule(pick=PICK, start=st.integers(0, 5))
    def start_transfer(self, pick: int, start: int) -> None:
        _, holding = self.pick(pick)
        blocks = holding.blocks[start:]
        leg = self.name("leg:")
        self.pool.hold_for_transfer(blocks, leg)
        holding.legs[leg] = blocks

    @precondition(lambda self: self.requests)
    @rule(pick=PICK)
    def finish(self, pick: int) -> None:
        name, holding = self.pick(pick)
        self.pool.release(holding.blocks, name)
        self.orphans.update(holding.legs)
        del self.requests[name]
        with contextlib.suppress(IntegrityError):
            self.pool.release(holding.blocks, name)
            raise AssertionError("a double release went through")

    @rule(pick=PICK)
    def end_transfer(self, pick: int) -> None:
        owners = [self.orphans, *(holding.legs for holding in self.requests.values())]
        legs = [(leg, owner) for owner in owners for leg in owner]
        if legs:
            leg, owner = legs[pick % len(legs)]
            self.pool.release_transfer(owner.pop(leg), leg)

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.pool.check_integrity()
        expected: dict[str, int] = {}
        held: set[int] = set()
        legs = dict(self.orphans)
        for name, holding in self.requests.items():
            expected[name] = len(holding.blocks)
            held.update(holding.blocks)
            legs.update(holding.legs)
        for leg, blocks in legs.items():
            if blocks:
                expected[leg] = len(blocks)
            held.update(blocks)
        assert self.pool.holders() == expected
        assert self.pool.num_used == len(held)
        assert self.pool.num_free == NUM_BLOCKS - len(held)
        assert self.pool.num_cached <= self.pool.num_free


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40)
