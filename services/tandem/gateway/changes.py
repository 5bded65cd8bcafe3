"""Waiting for the gateway to become ready, or not to be any more, without looking all the time."""

from __future__ import annotations

import asyncio


class Changes:
    """Wakes those who wait when the model, its files or the workers change.

    Lives in one event loop. Look first, then wait: nothing comes in between but what is awaited.
    """

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def notify(self) -> None:
        """Something changed."""
        self._next.set()
        self._next = asyncio.Event()

    async def wait(self) -> None:
        """Return after the next change."""
        await self._next.wait()
