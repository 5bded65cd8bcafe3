"""What the manager needs of whatever runs the worker processes. Ray is the one in use.

Shapes only. Every call may take long and may be cancelled; `start` and `launch` may be repeated
for the same process without harm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tandem.controller.roster import Endpoint, Role


@dataclass(frozen=True, slots=True)
class StartFailure:
    """Why a worker does not serve. `fatal`: it cannot, as it is configured."""

    cause: str
    fatal: bool


class Platform(Protocol):
    """Starts, finds and ends worker processes by name."""

    async def discover(self) -> list[str]:
        """Return the names of the worker processes that live already."""

    async def launch(self, name: str, role: Role) -> None:
        """Make a process for `name`. Returns before it runs."""

    async def start(self, name: str) -> Endpoint | StartFailure:
        """Load the model in the process and serve; or report where it serves already."""

    async def progress(self, name: str) -> str:
        """Return how far the process is in starting. Raises if it does not answer."""

    async def wait_until_dead(self, name: str) -> str:
        """Return the cause once the process is gone."""

    async def kill(self, name: str) -> None:
        """End the process without asking it. Nothing happens if it is gone."""

    async def stop(self, name: str) -> None:
        """End the process in good order, and give back what was reserved for it."""
