"""Iteration-level scheduling: what one forward pass computes. Pure; the same for both roles."""

from tandem.scheduler.scheduler import Scheduler, holder_of

__all__ = ["Scheduler", "holder_of"]
