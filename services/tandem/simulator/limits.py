"""The same cluster on a machine that is better in one respect: what helps is what limits it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tandem.simulator.cluster import ClusterSpec
from tandem.simulator.profile import IterationCost, Profile

_CHEAPER = 1.25
_MORE = 4


def improvements(spec: ClusterSpec) -> dict[str, ClusterSpec]:
    """The same cluster on machines that are better in one respect."""
    profile, cost, link = spec.profile, spec.profile.iteration, spec.profile.link
    prompts = {"prompt": cost.prompt, "prompt_token": cost.prompt_token, "attended": cost.attended}
    steps = {"fixed": cost.fixed, "decode": cost.decode, "context": cost.context}
    steps["beyond_knee"] = cost.beyond_knee
    blocks = spec.config.cache.num_blocks or profile.num_blocks
    profiles: dict[str, dict[str, object]] = {
        "prefill compute": {"iteration": _cheaper(profile, prompts)},
        "decode steps": {"iteration": _cheaper(profile, steps)},
    }
    if link is not None and spec.num_prefill:
        faster = {
            "bytes_per_second": link.bytes_per_second * _MORE,
            "latency": link.latency / _MORE,
        }
        profiles["KV links"] = {"link": link.model_copy(update=faster)}
    profiles["messages and gateway"] = {"rpc_seconds": 0.0, "gateway_seconds": 0.0}
    better = {
        what: replace(spec, profile=profile.model_copy(update=update))
        for what, update in profiles.items()
    }
    cache = spec.config.cache.model_copy(update={"num_blocks": _MORE * blocks})
    better["KV blocks"] = replace(spec, config=spec.config.model_copy(update={"cache": cache}))
    running = spec.config.scheduler.model_copy(
        update={"max_running": _MORE * spec.config.scheduler.max_running}
    )
    better["scheduler.max_running"] = replace(
        spec, config=spec.config.model_copy(update={"scheduler": running})
    )
    return better


def _cheaper(profile: Profile, terms: Mapping[str, float]) -> IterationCost:
    return profile.iteration.model_copy(
        update={name: value / _CHEAPER for name, value in terms.items()}
    )
