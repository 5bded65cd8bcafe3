"""What is measured: the two models with their load and objectives, and the two ways of serving.

Loads and objectives are round figures, set before the runs that are quoted anywhere: the loads to
keep two cores about half busy, the objectives so tight that a queue or a stall breaks them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from benchmarks.measures import Objectives
from tandem.core.config import TandemConfig

Mode = Literal["disaggregated", "colocated"]
MODES: tuple[Mode, ...] = ("disaggregated", "colocated")


@dataclass(frozen=True)
class Scenario:
    """One model under one load."""

    key: str
    title: str
    model_path: str
    """Empty: the bundled model."""
    dtype: Literal["float32", "bfloat16"]
    max_model_len: int
    rate: float
    requests: int
    runs: int
    length_factor: float
    shared_fraction: float
    system_prompt_tokens: int
    objectives: Objectives
    request_timeout: float = 180.0

    def config(self, mode: Mode) -> TandemConfig:
        """Return the cluster's configuration: the same two cores, split or together."""
        together = mode == "colocated"
        return TandemConfig.model_validate(
            {
                "model": {
                    "path": self.model_path,
                    "served_name": self.key,
                    "dtype": self.dtype,
                    "max_model_len": self.max_model_len,
                },
                "worker": {"disaggregated": not together, "threads": 2 if together else 1},
                "controller": {"prefill_workers": 0 if together else 1, "decode_workers": 1},
                "log_level": "warning",
            }
        )


def bundled(path: str = "") -> Scenario:
    """The model that ships with Tandem: small, so the cost of serving itself shows."""
    return Scenario(
        key="bundled",
        title="Bundled model",
        model_path=path,
        dtype="float32",
        max_model_len=4096,
        rate=6.0,
        requests=150,
        runs=3,
        length_factor=0.5,
        shared_fraction=0.5,
        system_prompt_tokens=128,
        objectives=Objectives(ttft=0.25, tpot=0.02),
    )


def qwen(path: Path) -> Scenario:
    """A model of the size that people run: memory-bound decode, compute-bound prefill."""
    return Scenario(
        key="qwen",
        title="Random weights in the shape of Qwen2.5-0.5B, bfloat16",
        model_path=str(path),
        dtype="bfloat16",
        max_model_len=4096,
        rate=0.8,
        requests=48,
        runs=2,
        length_factor=0.25,
        shared_fraction=0.5,
        system_prompt_tokens=64,
        objectives=Objectives(ttft=2.0, tpot=0.15),
    )


def quick(scenario: Scenario) -> Scenario:
    """Return the scenario as short as a smoke test: figures of it mean little."""
    return replace(scenario, runs=1, requests=max(8, scenario.requests // 4))
