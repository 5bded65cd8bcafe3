"""What the launcher tells each worker about its cores."""

from __future__ import annotations

import pytest

from tandem.controller import machine_cores
from tandem.core.config import ControllerConfig, PoolConfig, TandemConfig, WorkerConfig

NAMES = ("prefill-0", "decode-0")


@pytest.fixture(autouse=True)
def _four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_cores, "ownable_cores", lambda: (4, 6, 8, 9, 10))


def affinity(
    name: str, *, several_nodes: bool = False, gpus: float = 0.0, ranks: int = 1, **worker: object
) -> str:
    config = TandemConfig(
        worker=WorkerConfig.model_validate(worker),
        controller=ControllerConfig(gpus_per_worker=gpus),
        prefill=PoolConfig(tensor_parallel=ranks),
    )
    told = machine_cores.with_cores(config, NAMES, name, several_nodes=several_nodes)
    return told.worker.cpu_affinity


def test_workers_of_one_machine_get_cores_of_their_own() -> None:
    assert [affinity(name) for name in NAMES] == ["4,6", "8-9"]
    assert [affinity(name, threads=1) for name in NAMES] == ["4", "6"]


def test_nobody_is_pinned_where_the_cores_do_not_suffice() -> None:
    assert affinity("decode-0", threads=3) == "off"


def test_nobody_is_pinned_where_the_neighbours_are_not_known_or_the_model_is_on_a_gpu() -> None:
    assert affinity("decode-0", several_nodes=True) == "off"
    assert affinity("decode-0", gpus=0.5) == "off"
    assert affinity("decode-0", ranks=2) == "off"


def test_what_the_operator_says_is_kept() -> None:
    assert affinity("decode-0", cpu_affinity="off") == "off"
    assert affinity("decode-0", cpu_affinity="1-3") == "1-3"
