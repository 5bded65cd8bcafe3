"""Workers of one machine get cores of their own, or none do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.config import WorkerConfig
from tandem.core.cores import assign_cores, format_cores, parse_cores

WORKERS = ("prefill-0", "decode-0", "decode-1")


@given(st.sets(st.integers(0, 300), min_size=1))
def test_a_list_of_cores_reads_as_it_was_written(cores: set[int]) -> None:
    assert set(parse_cores(format_cores(cores))) == cores


def test_cores_are_written_as_linux_does() -> None:
    assert format_cores((3, 0, 2, 7)) == "0,2-3,7"


@pytest.mark.parametrize("text", ["", "a", "1-", "3-1", "1,1", "0-2,2", "-1"])
def test_what_is_no_list_of_cores_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="core"):
        parse_cores(text)
    with pytest.raises(ValueError, match="core"):
        WorkerConfig(cpu_affinity=text)


@given(
    allowed=st.lists(st.integers(0, 200), unique=True, max_size=40),
    count=st.integers(1, 6),
    threads=st.integers(0, 10),
)
def test_sets_are_disjoint_allowed_and_as_large_as_asked_for(
    allowed: list[int], count: int, threads: int
) -> None:
    names = [f"decode-{i}" for i in range(count)]
    sets = assign_cores(allowed, names, threads)
    given_out = [core for cores in sets.values() for core in cores]
    assert len(given_out) == len(set(given_out))
    assert set(given_out) <= set(allowed)
    each = threads or len(allowed) // count
    if each and each * count < len(allowed):
        assert {name: len(cores) for name, cores in sets.items()} == dict.fromkeys(names, each)
    else:
        assert not sets


def test_a_machine_with_too_few_cores_gives_nobody_any() -> None:
    assert not assign_cores((0, 1), WORKERS, 0)
    assert not assign_cores((0, 1, 2), WORKERS, 1), "nothing is left for the gateway"
    assert not assign_cores((0, 1, 2, 3), WORKERS, 2)


def test_a_worker_that_is_replaced_gets_the_set_that_it_had() -> None:
    sets = [assign_cores(range(8), WORKERS, 0) for _ in range(2)]
    assert sets[0] == sets[1] == {"prefill-0": (0, 1), "decode-0": (2, 3), "decode-1": (4, 5)}
