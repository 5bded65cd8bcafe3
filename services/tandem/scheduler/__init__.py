"""Iteration-level scheduling: what one forward pass computes. Pure; the same for both roles."""

from tandem.scheduler.policies import (
    Policy,
    PoolRole,
    Steps,
    Task,
    View,
    make_policy,
    policy_name,
)
from tandem.scheduler.scheduler import Scheduler

__all__ = [
    "Policy",
    "PoolRole",
    "Scheduler",
    "Steps",
    "Task",
    "View",
    "make_policy",
    "policy_name",
]
