"""The engine thread of a worker: the only one that touches scheduler, block pool and sequences.

Everything that happens elsewhere (messages, transfers, timers) is posted here and applied between
two iterations, so the state needs no locks and every decision sees one consistent view.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import structlog

from tandem.worker.affinity import pin_thread

log = structlog.get_logger(__name__)

Event = tuple[Callable[..., None], tuple[Any, ...]]
Result = TypeVar("Result")


class EngineLoop:
    """Runs `step` while it reports work, applying posted events before each call.

    `step` returns whether it should be called again at once; otherwise the thread sleeps until the
    next event. An exception in an event or a step is logged and never ends the thread; what it
    means for requests is for the caller to settle before it travels here.
    """

    def __init__(self, name: str, step: Callable[[], bool], core: int | None = None) -> None:
        """`core`: the one that the thread stays on; None: any."""
        self._step = step
        self._core = core
        self._inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"{name}-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, function: Callable[..., None], *args: Any) -> None:
        """Run `function(*args)` in the engine thread, in order of posting. Any thread may call."""
        self._inbox.put((function, args))

    async def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run `function(*args)` in the engine thread and return or raise what it does."""
        outcome: Future[Result] = Future()

        def run() -> None:
            if not outcome.set_running_or_notify_cancel():
                return  # nobody waits any more
            try:
                outcome.set_result(function(*args))
            except Exception as error:
                outcome.set_exception(error)

        self.post(run)
        return await asyncio.wrap_future(outcome)

    def stop(self, timeout: float = 10.0) -> None:
        """End the thread after the iteration in progress."""
        self.post(self._stop)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _stop(self) -> None:
        self._stopping = True

    def _run(self) -> None:
        pin_thread(self._core)
        busy = False
        while not self._stopping:
            self._apply_events(wait=not busy)
            try:
                busy = self._step()
            except Exception:
                log.exception("iteration failed")
                busy = False  # tried again at the next event, not in a hot loop

    def _apply_events(self, *, wait: bool) -> None:
        while True:
            try:
                function, args = self._inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            try:
                function(*args)
            except Exception:
                log.exception("event failed", handler=getattr(function, "__qualname__", "?"))
