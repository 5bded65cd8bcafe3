"""Which systems are compared, all on the same two cores. A line of settings adds one of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from benchmarks import vllm
from benchmarks.launch import HOST, running_cluster
from benchmarks.load import NICENESS, LoadJob
from benchmarks.peers.environments import UnavailableError
from benchmarks.workload import PlannedRequest
from tandem.core.config import TandemConfig

KV_BYTES = 2**30
MAX_MODEL_LEN = 4096
REQUEST_TIMEOUT = 240.0


@dataclass(frozen=True)
class Endpoint:
    """Where a system is reached."""

    port: int
    model: str
    prefill_port: int = 0
    """Of vLLM's pair: where prompts go first."""

    def job(self, requests: Sequence[PlannedRequest]) -> LoadJob:
        """Return what the client is told; it runs at nice 19."""
        return LoadJob(
            host=HOST,
            port=self.port,
            model=self.model,
            timeout=REQUEST_TIMEOUT,
            niceness=NICENESS,
            requests=tuple(requests),
            prefill_port=self.prefill_port,
        )


Open = Callable[[Path, Sequence[int]], AbstractContextManager[Endpoint]]


@dataclass(frozen=True)
class System:
    """One line of the table."""

    key: str
    name: str
    cores: str
    open: Open
    """Starts it with a model on two cores. Raises `UnavailableError` or `ClusterError`."""
    split: bool
    """Prefill and decode have a core each, so that one can be asked about the other."""


def _tandem(**settings: Mapping[str, Any]) -> Open:
    @contextmanager
    def started(model: Path, cores: Sequence[int]) -> Iterator[Endpoint]:
        with running_cluster(tandem_config(model, settings)) as cluster:
            yield Endpoint(cluster.port, "model")

    return started


def tandem_config(model: Path, settings: Mapping[str, Mapping[str, Any]]) -> TandemConfig:
    """Return a cluster's configuration; `settings` are by section.

    Raises `UnavailableError` for a setting that this version does not have.
    """
    basis: dict[str, dict[str, Any]] = {
        "model": {
            "path": str(model),
            "served_name": "model",
            "dtype": "bfloat16",
            "max_model_len": MAX_MODEL_LEN,
        },
        "cache": {"memory_bytes": KV_BYTES},
    }
    sections = {
        name: {**basis.get(name, {}), **settings.get(name, {})} for name in {**basis, **settings}
    }
    try:
        return TandemConfig.model_validate({**sections, "log_level": "warning"})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UnavailableError(f"{name}: {first['msg']}") from error


@contextmanager
def _vllm_colocated(model: Path, cores: Sequence[int]) -> Iterator[Endpoint]:
    with vllm.colocated(model, cores, preload=True) as (_, port):
        yield Endpoint(port, vllm.SERVED_NAME)


@contextmanager
def _vllm_pair(model: Path, cores: Sequence[int]) -> Iterator[Endpoint]:
    with vllm.pair(model, cores, preload=True) as (prefill, decode):
        yield Endpoint(decode, vllm.SERVED_NAME, prefill)


_SPLIT: dict[str, Any] = {
    "worker": {"disaggregated": True, "threads": 1},
    "controller": {"prefill_workers": 1, "decode_workers": 1},
}
_NO_LENDING: dict[str, Any] = {"lending": {"mode": "threshold"}}
_OBJECTIVE: dict[str, Any] = {"itl_objective": 0.1}
"""A little less than the mean TPOT that the load's objectives allow."""
_TOGETHER: dict[str, Any] = {
    "worker": {"disaggregated": False, "threads": 2},
    "controller": {"prefill_workers": 0, "decode_workers": 1},
}

SYSTEMS = (
    System(
        "tandem-lending",
        "Tandem, apart, lending slack",
        "1 + 1",
        _tandem(**_SPLIT, lending={"mode": "measured"}, scheduler=_OBJECTIVE),
        split=True,
    ),
    System("tandem", "Tandem, apart", "1 + 1", _tandem(**_SPLIT, **_NO_LENDING), split=True),
    System("tandem-colocated", "Tandem, colocated", "2", _tandem(**_TOGETHER), split=False),
    System(
        "tandem-auto-chunk",
        "Tandem, colocated, auto_chunk",
        "2",
        _tandem(**_TOGETHER, scheduler={"policy": "auto_chunk", "auto_chunk_seconds": 0.1}),
        split=False,
    ),
    System("vllm", "vLLM, colocated", "2", _vllm_colocated, split=False),
    System("vllm-pair", "vLLM, apart over NIXL", "1 + 1", _vllm_pair, split=True),
)
