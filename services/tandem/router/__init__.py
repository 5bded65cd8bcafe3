"""Which prefill worker and which decode worker serve a request. Pure decisions, no I/O."""

from tandem.router.router import Assignment, Router

__all__ = ["Assignment", "Router"]
