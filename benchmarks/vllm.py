"""vLLM's servers: colocated on all cores, or a prefill and a decode server that share KV by NIXL.

Settings are those under which it is fastest on a CPU here; docs/performance.md names them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.launch import HOST, free_ports
from benchmarks.peers.environments import PEERS, ensure
from benchmarks.peers.recipes import VLLM, vllm_preload
from benchmarks.servers import Group, http_server, wait_until_healthy

SERVED_NAME = "model"
KV_GIB = 1
MAX_MODEL_LEN = 4096
MAX_SEQUENCES = 64


@contextmanager
def colocated(model: Path, cores: Sequence[int], preload: bool) -> Iterator[tuple[Group, int]]:
    """Serve on `cores` with one server; yields it with its port."""
    ensure(VLLM)
    [port] = free_ports(1)
    environment = _environment(cores)
    if preload:
        environment["LD_PRELOAD"] = vllm_preload()
    log = PEERS / "vllm-server.log"
    with http_server(_command(model, port), log, environment) as server:
        wait_until_healthy(server, port, log)
        yield server, port


@contextmanager
def pair(model: Path, cores: Sequence[int], preload: bool) -> Iterator[tuple[int, int]]:
    """Serve with a prefill server on the first core and a decode server on the second.

    Yields their ports.
    """
    ensure(VLLM)
    ports = free_ports(4)
    transfer = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    options = ["--kv-transfer-config", json.dumps(transfer)]
    with ExitStack() as stack:
        waiting = []
        for core, port, side_channel in zip(cores, ports[:2], ports[2:], strict=False):
            environment = {
                **_environment([core]),
                "UCX_NET_DEVICES": "lo",
                "UCX_TLS": "tcp,shm,self",
                "VLLM_NIXL_SIDE_CHANNEL_HOST": HOST,
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_channel),
            }
            if preload:
                environment["LD_PRELOAD"] = vllm_preload()
            log = PEERS / f"vllm-pair-{len(waiting)}.log"
            command = [*_command(model, port), *options]
            server = stack.enter_context(http_server(command, log, environment))
            waiting.append((server, port, log))
        for server, port, log in waiting:
            wait_until_healthy(server, port, log)
        yield ports[0], ports[1]


def _environment(cores: Sequence[int]) -> dict[str, str]:
    return {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(PEERS / "vllm-cache"),
        "VLLM_HOST_IP": HOST,
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{VLLM.directory / 'bin'}:/usr/local/bin:/usr/bin:/bin",
    }


def _command(model: Path, port: int) -> list[str]:
    return [
        *(str(VLLM.python), str(VLLM.directory / "bin" / "vllm"), "serve", str(model)),
        *("--host", HOST, "--port", str(port), "--served-model-name", SERVED_NAME),
        *("--dtype", "bfloat16", "--max-model-len", str(MAX_MODEL_LEN)),
        *("--max-num-seqs", str(MAX_SEQUENCES)),
    ]
