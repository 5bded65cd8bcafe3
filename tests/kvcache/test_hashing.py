"""Block hashes name a whole prefix: equal if and only if tokens, salt and model are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.kvcache.hashing import HASH_BYTES, chain_hashes, extend_hashes

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def test_only_full_blocks_have_hashes() -> None:
    assert chain_hashes([1, 2, 3], 4) == []
    hashes = chain_hashes(range(11), 4)
    assert len(hashes) == 2
    assert all(len(block_hash) == HASH_BYTES for block_hash in hashes)


def test_hash_is_stable_across_processes_and_releases() -> None:
    assert chain_hashes([1, 2, 3, 4], 2)[1].hex() == "02c632d5aaef0a92cc9792cfaaf9816f"


def test_same_block_after_another_prefix_has_another_hash() -> None:
    assert chain_hashes([1, 2, 9, 9], 2)[1] != chain_hashes([3, 4, 9, 9], 2)[1]


@pytest.mark.parametrize(
    "other", [{"salt": "b"}, {"salt": ""}, {"model_key": "m"}, {"salt": "", "model_key": "a"}]
)
def test_salt_and_model_keep_prefixes_apart(other: dict[str, str]) -> None:
    mine = chain_hashes([1, 2, 3, 4], 2, salt="a")
    theirs = chain_hashes([1, 2, 3, 4], 2, **{"salt": "a", **other})
    assert not set(mine) & set(theirs)


def test_salt_and_model_cannot_be_shifted_into_each_other() -> None:
    assert chain_hashes([1], 1, salt="ab", model_key="c") != chain_hashes(
        [1], 1, salt="a", model_key="bc"
    )


@given(TOKENS, st.integers(1, 7), st.data())
def test_extending_token_by_token_equals_hashing_at_once(
    tokens: list[int], block_size: int, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(tokens)))
    hashes = chain_hashes(tokens[:cut], block_size, "salt")
    for end in range(cut, len(tokens) + 1):
        extend_hashes(hashes, tokens[:end], block_size, "salt")
    assert hashes == chain_hashes(tokens, block_size, "salt")


@given(TOKENS, TOKENS, st.integers(1, 7))
def test_equal_hashes_mean_equal_prefixes(a: list[int], b: list[int], block_size: int) -> None:
    hashes_a, hashes_b = chain_hashes(a, block_size), chain_hashes(b, block_size)
    for index in range(min(len(hashes_a), len(hashes_b))):
        end = (index + 1) * block_size
        assert (hashes_a[index] == hashes_b[index]) == (a[:end] == b[:end])
