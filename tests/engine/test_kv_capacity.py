"""KV blocks: as configured, or a fair share of what is free; always said in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs
from tests.engine.conftest import TinyModel

from tandem.core.config import CacheConfig, ModelConfig
from tandem.core.errors import ConfigError
from tandem.engine import kv_capacity
from tandem.engine.kv_capacity import KVCapacity, Neighbours, measure_kv_capacity
from tandem.engine.memory import available_memory
from tandem.engine.spec import ModelSpec, load_spec

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture
def spec(tiny_model: TinyModel) -> ModelSpec:
    return load_spec(tiny_model("qwen2"), ModelConfig())


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_capacity, "available_memory", lambda: GIB)


def measured(spec: ModelSpec, neighbours: Neighbours, **cache: object) -> KVCapacity:
    return measure_kv_capacity(CacheConfig.model_validate(cache), spec, CPU, neighbours)


@pytest.mark.usefixtures("free")
def test_workers_share_a_fraction_of_free_memory_evenly(spec: ModelSpec) -> None:
    alone = measured(spec, Neighbours(1, 10**6), memory_fraction=0.8)
    among_four = measured(spec, Neighbours(4, 10**6), memory_fraction=0.8)
    assert alone.num_blocks * alone.block_bytes <= 0.8 * GIB
    assert alone.num_blocks * alone.block_bytes > 0.8 * GIB - alone.block_bytes
    assert among_four.num_blocks == alone.num_blocks // 4
    assert "80% of 1 GiB free, shared by 4 workers" in str(among_four)


@pytest.mark.usefixtures("free")
def test_no_more_is_taken_than_the_sequences_can_fill(spec: ModelSpec) -> None:
    few = measured(spec, Neighbours(1, 2), block_size=16)
    assert few.num_tokens == 2 * -(-spec.max_model_len // 16) * 16


@pytest.mark.usefixtures("free")
def test_what_is_configured_goes_before_what_is_free(spec: ModelSpec) -> None:
    assert measured(spec, Neighbours(), num_blocks=7, memory_bytes=2**20).num_blocks == 7
    by_bytes = measured(spec, Neighbours(), memory_bytes=2**20)
    assert by_bytes.num_blocks == 2**20 // by_bytes.block_bytes
    assert by_bytes.source == "cache.memory_bytes"


def test_no_room_for_one_block_is_an_error(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_capacity, "available_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"no memory is left for KV \(50% of 1000 B free\)"):
        measured(spec, Neighbours())


def test_a_context_that_does_not_fit_is_a_warning(spec: ModelSpec) -> None:
    with capture_logs() as logs:
        measured(spec, Neighbours(), num_blocks=1)
        measured(spec, Neighbours(), num_blocks=spec.max_model_len)
    (warning,) = logs
    assert warning["log_level"] == "warning"
    assert warning["max_model_len"] == spec.max_model_len


def machine(root: Path, groups: dict[str, tuple[str, int, int]], own: str) -> Path:
    """A root directory with memory control groups: path -> limit, used, of that reclaimable."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    (root / "proc/self/cgroup").write_text(f"0::{own}\n")
    for path, (limit, used, reclaimable) in groups.items():
        group = root / "sys/fs/cgroup" / path.strip("/")
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 1\ninactive_file {reclaimable}\n")
    return root


def test_free_memory_is_what_the_kernel_says_without_limits(tmp_path: Path) -> None:
    assert available_memory(machine(tmp_path, {"/a": ("max", 5, 0)}, "/a")) == 8000 * 1024


@pytest.mark.parametrize("own", ["/pod", "/pod/container"])
def test_free_memory_is_what_the_tightest_group_has_left(tmp_path: Path, own: str) -> None:
    groups = {"/pod": ("500000", 200000, 50000), "/pod/container": ("max", 100, 0)}
    assert available_memory(machine(tmp_path, groups, own)) == 350000


def test_this_machine_has_free_memory() -> None:
    assert available_memory() > 0
