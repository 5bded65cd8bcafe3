"""The consumer's end of one request: an async iterator that may be closed at any moment by anyone.

Unlike an async generator it can be closed while another task waits for its next event, as happens
when a client disconnects. Invariant: however the consumer stops - end, error, `aclose`, a cancelled
task, or simply dropping the iterator - the request is over for the cluster too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from tandem.core.errors import TandemError
from tandem.core.request import Request
from tandem.gateway.dispatch.flight import Flight
from tandem.gateway.interfaces import OutputEvent


class TokenStream(AsyncIterator[OutputEvent]):
    """Starts its request when it is first iterated; ends after a finish reason or an error."""

    def __init__(
        self,
        request: Request,
        open_flight: Callable[[Request], Flight],
        cancel_flight: Callable[[Flight], None],
    ) -> None:
        self._request = request
        self._open = open_flight
        self._cancel = cancel_flight
        self._flight: Flight | None = None
        self._over = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __anext__(self) -> OutputEvent:
        if self._over:
            raise StopAsyncIteration
        try:
            flight = self._started()
            event = await flight.next_event()
        except BaseException:  # refused, or this task was cancelled
            self._close()
            raise
        if isinstance(event, OutputEvent):
            self._over = event.finish_reason is not None
            return event
        self._over = True
        if isinstance(event, TandemError):
            raise event
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel the request everywhere, unless it is over. Idempotent."""
        self._close()

    def __del__(self) -> None:
        loop, flight = self._loop, self._flight
        if flight is not None and not self._over and loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._cancel, flight)

    def _started(self) -> Flight:
        if self._flight is None:
            self._loop = asyncio.get_running_loop()
            self._flight = self._open(self._request)
        return self._flight

    def _close(self) -> None:
        self._over = True
        if self._flight is not None:
            self._cancel(self._flight)
