"""Fixtures of the whole-cluster tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from local_cluster import Connect, LocalCluster, MakeConfig, Recorder, until_ready
from tandem.core.config import TandemConfig
from tandem.gateway.dispatch import Dispatcher
from tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def make_config(tiny_llama: Path) -> MakeConfig:
    """Small blocks, small chunks, short timeouts: everything that can go wrong goes wrong soon."""

    def make(model: Path = tiny_llama, /, **sections: dict[str, object]) -> TandemConfig:
        base: dict[str, dict[str, object]] = {
            "model": {"path": str(model), "served_name": "tiny"},
            "cache": {"block_size": 4, "num_blocks": 2048},
            "scheduler": {"max_batch_tokens": 64, "chunk_size": 16},
            "worker": {
                "threads": 1,
                "heartbeat_interval": 0.1,
                "peer_timeout": 1.5,
                "local_prefill_max_tokens": 4,
            },
            "transfer": {"layers_per_group": 1},
            "gateway": {"worker_timeout": 1.5},
        }
        for name, values in sections.items():
            base.setdefault(name, {}).update(values)
        return TandemConfig.model_validate(base)

    return make


@pytest.fixture
def connect() -> Connect:
    """A dispatcher that has found the cluster's decode workers."""

    @asynccontextmanager
    async def connected(cluster: LocalCluster) -> AsyncIterator[Dispatcher]:
        observer = Recorder()
        dispatcher = Dispatcher(
            cluster.config.gateway, cluster.controller_address, observer, seed=0
        )
        await dispatcher.start()
        try:
            await until_ready(dispatcher)
            yield dispatcher
        finally:
            await dispatcher.close()

    return connected
