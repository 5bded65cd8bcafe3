"""Every scheduling policy by name. Each is a small pure class behind `Policy`, in its own file.

A name that is not in the table is looked up among the entry points of the group
`tandem.scheduling_policies`, so that a user's own policy lives in the user's own package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Literal

from tandem.core.config import SchedulerConfig
from tandem.core.errors import ConfigError
from tandem.scheduler.policies.auto_chunk import AutoChunk
from tandem.scheduler.policies.base import Policy, Steps, Task, View
from tandem.scheduler.policies.chunked_prefill import ChunkedPrefill
from tandem.scheduler.policies.concatenation import Concatenation
from tandem.scheduler.policies.continuous_batching import ContinuousBatching
from tandem.scheduler.policies.deadline import Deadline
from tandem.scheduler.policies.decode_first import DecodeFirst
from tandem.scheduler.policies.fair_share import FairShare
from tandem.scheduler.policies.iteration_level import IterationLevel
from tandem.scheduler.policies.prefill_first import PrefillFirst
from tandem.scheduler.policies.priority_classes import PriorityClasses
from tandem.scheduler.policies.shortest_prompt import ShortestPrompt
from tandem.scheduler.policies.static_batching import StaticBatching

__all__ = [
    "ENTRY_POINT_GROUP",
    "POLICIES",
    "Policy",
    "PoolRole",
    "Steps",
    "Task",
    "View",
    "make_policy",
    "policy_name",
]

MakePolicy = Callable[[SchedulerConfig], Policy]
PoolRole = Literal["prefill", "decode"]
ENTRY_POINT_GROUP = "tandem.scheduling_policies"

POLICIES: Mapping[str, MakePolicy] = {
    "static_batching": StaticBatching,
    "continuous_batching": ContinuousBatching,
    "iteration_level": IterationLevel,
    "prefill_first": PrefillFirst,
    "decode_first": DecodeFirst,
    "chunked_prefill": ChunkedPrefill,
    "auto_chunk": AutoChunk,
    "concatenation": Concatenation,
    "priority_classes": PriorityClasses,
    "deadline": Deadline,
    "fair_share": FairShare,
    "shortest_prompt": ShortestPrompt,
}


def policy_name(config: SchedulerConfig, role: PoolRole) -> str:
    """Return the name of the policy that workers of a role follow."""
    own = config.prefill_policy if role == "prefill" else config.decode_policy
    return own or config.policy


def make_policy(config: SchedulerConfig, role: PoolRole = "decode") -> Policy:
    """Return a new policy for one worker. Raises `ConfigError` for a name that nobody provides."""
    name = policy_name(config, role)
    make = POLICIES.get(name) or _find_custom(name)
    policy = make(config)
    if not isinstance(policy, Policy):
        raise ConfigError(f"scheduler.policy {name!r}: {make!r} made no tandem Policy: {policy!r}")
    return policy


def _find_custom(name: str) -> MakePolicy:
    """Load a policy that another package provides."""
    found = entry_points(group=ENTRY_POINT_GROUP)
    if name not in found.names:
        known = ", ".join([*POLICIES, *sorted(found.names)])
        raise ConfigError(f"scheduler.policy: {name!r} is unknown; there are {known}")
    try:
        make: MakePolicy = found[name].load()
    except Exception as error:
        raise ConfigError(f"scheduler.policy {name!r} cannot be loaded: {error}") from error
    return make
