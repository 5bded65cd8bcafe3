"""Packed weights from the last start: the same answers, and never anybody else's weights."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs
from tests.engine.conftest import TinyModel
from tests.engine.driver import Driver, greedy, request

from tandem.core.config import CacheConfig, ModelConfig
from tandem.core.errors import ModelLoadError
from tandem.engine import packed_identity
from tandem.engine.engine import Engine
from tandem.engine.models.compiled import CompiledModel
from tandem.engine.packed_cache import PackedCache, in_parallel
from tandem.engine.packed_format import Build, Parts
from tandem_kernels import runs_compiled_decoder

needs_packing = pytest.mark.skipif(
    not runs_compiled_decoder("cpu"), reason="the C++ kernels were not built"
)


@pytest.fixture
def directory(tiny_model: TinyModel, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("qwen2"), tmp_path / "model"))


@pytest.fixture
def engine(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Engine]:
    """Starts an engine that keeps packed weights however small they are."""
    monkeypatch.setattr(packed_identity, "SMALLEST_BYTES", 0)
    model = ModelConfig(packed_cache=str(tmp_path / "cache"))
    return lambda: Engine(directory, model, CacheConfig(num_blocks=256, block_size=4))


def answer(engine: Engine) -> list[int]:
    assert isinstance(engine._decoder, CompiledModel)
    return Driver(engine, 16).run([request("a", range(30), greedy(10))])["a"]


def events(logs: list[dict[str, object]]) -> list[str]:
    return [str(entry["event"]) for entry in logs if "packed" in str(entry["event"])]


@needs_packing
def test_a_second_start_maps_what_the_first_packed(engine: Callable[[], Engine]) -> None:
    first = answer(engine())
    with capture_logs() as logs:
        assert answer(engine()) == first
    assert events(list(logs)) == ["packed weights mapped"]


@needs_packing
def test_weights_that_changed_are_packed_again(
    engine: Callable[[], Engine], directory: Path
) -> None:
    answer(engine())
    os.utime(directory / "model.safetensors", ns=(1, 1))
    with capture_logs() as logs:
        answer(engine())
    (again, mapped) = [entry for entry in logs if "packed" in entry["event"]]
    assert again["reason"] == "stale: files is not what the entry was made for"
    assert mapped["event"] == "packed weights mapped"


@needs_packing
@pytest.mark.parametrize("place", [0, 30, -1])
def test_a_damaged_entry_is_made_again(
    engine: Callable[[], Engine], tmp_path: Path, place: int
) -> None:
    first = answer(engine())
    (entry,) = (tmp_path / "cache").glob("*.packed")
    content = bytearray(entry.read_bytes())
    content[place] ^= 1
    entry.write_bytes(content)
    with capture_logs() as logs:
        assert answer(engine()) == first
    assert "damaged" in next(e["reason"] for e in logs if "again" in e["event"])


@needs_packing
def test_a_truncated_entry_is_made_again(engine: Callable[[], Engine], tmp_path: Path) -> None:
    first = answer(engine())
    (entry,) = (tmp_path / "cache").glob("*.packed")
    entry.write_bytes(entry.read_bytes()[:-10])
    assert answer(engine()) == first


@needs_packing
def test_a_checkpoint_that_does_not_fit_leaves_no_entry(
    engine: Callable[[], Engine], directory: Path, tmp_path: Path
) -> None:
    (directory / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelLoadError):
        engine()
    assert not list((tmp_path / "cache").glob("*.p*"))


@needs_packing
def test_a_directory_that_cannot_be_made_only_costs_the_reuse(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_identity, "SMALLEST_BYTES", 0)
    (tmp_path / "file").write_text("in the way")
    model = ModelConfig(packed_cache=str(tmp_path / "file" / "cache"))
    with capture_logs() as logs:
        answer(Engine(directory, model, CacheConfig(num_blocks=256, block_size=4)))
    assert "packed weights are not kept" in events(list(logs))


@needs_packing
def test_off_keeps_nothing(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_identity, "SMALLEST_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    Engine(directory, ModelConfig(packed_cache="off"), CacheConfig(num_blocks=8))
    assert not (tmp_path / "xdg").exists()
    Engine(directory, ModelConfig(), CacheConfig(num_blocks=8))
    assert list((tmp_path / "xdg/tandem/packed").glob("*.packed"))


# ---------------------------------------------------------------- the directory


def building(value: float, calls: list[float]) -> Build:
    def build(add: Callable[[str, object], None]) -> None:
        calls.append(value)
        add("part", torch.full((1000,), value))

    return build


def load(cache: PackedCache, name: str, calls: list[float], value: float = 1.0) -> Parts | None:
    return cache.load(name, {"of": name}, 4000, building(value, calls), threads=2)


def test_the_longest_unused_entry_is_evicted(tmp_path: Path) -> None:
    calls: list[float] = []
    cache = PackedCache(tmp_path, 2**30)
    for name in "ab":
        load(cache, name, calls)
    for age, path in enumerate(sorted(tmp_path.glob("*.packed"))):
        os.utime(path, (age, age))
    load(cache, "a", calls)  # used again, so b is the oldest
    size = next(tmp_path.glob("a*.packed")).stat().st_size
    load(PackedCache(tmp_path, size + 4000), "c", calls)
    assert {path.name[0] for path in tmp_path.glob("*.packed")} == {"a", "c"}
    assert len(calls) == 3


def test_what_is_larger_than_the_bound_is_not_kept(tmp_path: Path) -> None:
    assert load(PackedCache(tmp_path, 3999), "a", []) is None
    assert not list(tmp_path.iterdir())


def test_of_several_at_once_one_builds_and_all_read_it(tmp_path: Path) -> None:
    calls: list[float] = []
    found: list[float] = []

    def start(value: float) -> None:
        parts = load(PackedCache(tmp_path, 2**30), "a", calls, value)
        assert parts is not None
        found.append(float(parts["part"][0]))

    threads = [threading.Thread(target=start, args=(float(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(calls) == 1
    assert found == calls * 4


def test_jobs_report_in_order_and_fail_as_the_first_that_fails() -> None:
    names: list[str] = []
    jobs = {str(n): (lambda n=n: 1 // (5 - n)) for n in range(10)}
    with pytest.raises(ZeroDivisionError):
        in_parallel(3, jobs, lambda name, result: names.append(name))
    assert names == ["0", "1", "2", "3", "4"]
