"""Waiting for a cluster to start, as `serve` and `up` do it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.commands.progress import READY, ClusterView, StartProgress
from tandem.core.errors import ModelLoadError, UnavailableError

if TYPE_CHECKING:
    from tandem.controller.session import ControllerHandle

MAX_START_FAILURES = 3


def everyone_ready(handle: ControllerHandle, view: ClusterView, progress: StartProgress) -> bool:
    """Show how far the workers are; returns whether all of them serve.

    Raises `ModelLoadError` if one never can, `UnavailableError` if one keeps failing.
    """
    status = view.status()
    progress.workers(status)
    if cause := handle.fatal():
        raise ModelLoadError(cause)
    if status is None:
        return False
    for worker in status.workers:
        if worker.restarts >= MAX_START_FAILURES:
            raise UnavailableError(f"{worker.name} does not start: {worker.detail}")
    return all(worker.state == READY for worker in status.workers)
