"""Property tests here are deterministic and have no deadline: a slow machine is no failure."""

from __future__ import annotations

import pytest
from hypothesis import settings

from tandem.core.config import TandemConfig
from tandem.simulator import Profile
from tandem.simulator.cluster import ClusterSpec

settings.register_profile("tandem", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("tandem")


@pytest.fixture
def profile() -> Profile:
    """Round figures: 10 ms, 1 ms per prompt token, 1 ms per decode; KV takes 0.1 ms per token."""
    return Profile.model_validate(
        {
            "name": "round",
            "source": "made up",
            "iteration": {"fixed": 0.010, "prompt_token": 0.001, "decode": 0.001, "context": 0.0},
            "link": {
                "bytes_per_second": 1e6,
                "latency": 0.0,
                "kv_bytes_per_token": 100,
                "layer_groups": 4,
            },
            "rpc_seconds": 0.001,
            "num_blocks": 64,
            "max_model_len": 1000,
        }
    )


@pytest.fixture
def make_spec(profile: Profile):  # type: ignore[no-untyped-def]
    """A cluster of `prefill` and `decode` workers with small blocks and budgets."""

    def make(prefill: int, decode: int, num_blocks: int = 64, **scheduler: object) -> ClusterSpec:
        limits = {"max_batch_tokens": 16, "chunk_size": 8, "max_running": 8, **scheduler}
        config = TandemConfig.model_validate(
            {
                "cache": {"block_size": 4, "num_blocks": num_blocks},
                "scheduler": limits,
                "worker": {"local_prefill_max_tokens": 2},
            }
        )
        return ClusterSpec(profile, config, prefill, decode)

    return make
