"""Who takes part: every engine with how it is started on two cores."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import vllm
from benchmarks.client import ROOT
from benchmarks.launch import HOST, free_ports, running_cluster
from benchmarks.peers.environments import PEERS, ensure
from benchmarks.peers.recipes import (
    OPENVINO,
    TRANSFORMERS,
    VLLM_VERSION,
    llama_cpp_model,
    llama_cpp_server,
    openvino_model,
)
from benchmarks.peers.sessions import Server, Session, program
from benchmarks.servers import http_server, wait_until_healthy
from tandem.core.config import TandemConfig

OFFLINE = {"HF_HUB_OFFLINE": "1"}
LLAMA_SLOTS, LLAMA_CONTEXT = 32, 40960
"""Places for sequences, and tokens of KV over all of them."""
TANDEM_KV_BYTES = 2**30
MAX_MODEL_LEN = 4096

Open = Callable[[Path, Sequence[int]], AbstractContextManager[Session]]


@dataclass(frozen=True)
class Peer:
    """One row of the table."""

    key: str
    name: str
    how: str
    """What is between the client and the engine."""
    open: Open
    """Starts it with a model on some cores. Raises `UnavailableError` or `ClusterError`."""
    lasts: bool = True
    """Frozen between its turns; false: started anew for each, because it minds the clock."""

    @property
    def ours(self) -> bool:
        """Whether it is Tandem."""
        return self.key.startswith("tandem")


@contextmanager
def _tandem(model: Path, cores: Sequence[int]) -> Iterator[Session]:
    config = TandemConfig.model_validate(
        {
            "model": {
                "path": str(model),
                "served_name": "model",
                "dtype": "bfloat16",
                "max_model_len": MAX_MODEL_LEN,
            },
            "cache": {"memory_bytes": TANDEM_KV_BYTES},
            "worker": {"disaggregated": False, "threads": len(cores)},
            "controller": {"prefill_workers": 0, "decode_workers": 1},
            "log_level": "warning",
        }
    )
    with running_cluster(config) as cluster:
        yield Server("Tandem", cluster.port, "model")


@contextmanager
def _tandem_engine(model: Path, cores: Sequence[int]) -> Iterator[Session]:
    path = f"{ROOT / 'services'}:{ROOT / 'kernels'}"
    arguments = [str(model), str(len(cores))]
    with program(sys.executable, "run_tandem", arguments, {"PYTHONPATH": path}) as session:
        yield session


def _vllm(preload: bool) -> Open:
    @contextmanager
    def started(model: Path, cores: Sequence[int]) -> Iterator[Session]:
        with vllm.colocated(model, cores, preload) as (group, port):
            yield Server(f"vLLM {VLLM_VERSION}", port, vllm.SERVED_NAME, group)

    return started


def _openvino(cache_type: str) -> Open:
    @contextmanager
    def started(model: Path, cores: Sequence[int]) -> Iterator[Session]:
        exported = openvino_model(model)
        arguments = [str(exported), cache_type, str(len(cores))]
        with program(OPENVINO.python, "run_openvino", arguments, OFFLINE) as session:
            yield session

    return started


@contextmanager
def _llama_cpp(model: Path, cores: Sequence[int]) -> Iterator[Session]:
    [port] = free_ports(1)
    log = PEERS / "llama-server.log"
    threads = str(len(cores))
    command = [
        *(str(llama_cpp_server()), "-m", str(llama_cpp_model(model))),
        *("--host", HOST, "--port", str(port), "-t", threads, "-tb", threads),
        *("-np", str(LLAMA_SLOTS), "-c", str(LLAMA_CONTEXT), "-ub", "512"),
    ]
    with http_server(command, log) as group:
        wait_until_healthy(group, port, log)
        yield Server("llama.cpp", port, "model", group, {"cache_prompt": False})


@contextmanager
def _transformers(model: Path, cores: Sequence[int]) -> Iterator[Session]:
    ensure(TRANSFORMERS)
    arguments = [str(model), str(len(cores))]
    with program(TRANSFORMERS.python, "run_transformers", arguments, OFFLINE) as session:
        yield session


PEERS_IN_TURN = (
    Peer("tandem", "Tandem, colocated", "gateway, HTTP", _tandem, lasts=False),
    Peer("tandem-engine", "Tandem's engine", "in process", _tandem_engine),
    Peer("vllm", "vLLM", "server, HTTP", _vllm(preload=False)),
    Peer("vllm-preload", "vLLM, tcmalloc + libiomp5", "server, HTTP", _vllm(preload=True)),
    Peer("openvino", "OpenVINO GenAI, KV bf16", "in process", _openvino("bf16")),
    Peer("openvino-u8", "OpenVINO GenAI, KV u8 (its default)", "in process", _openvino("default")),
    Peer("llama.cpp", "llama.cpp server", "server, HTTP", _llama_cpp),
    Peer("transformers", "transformers, continuous batching", "in process", _transformers),
)
