"""All gateway processes of one machine, started, watched and stopped as one.

Several share the HTTP and the gRPC port (SO_REUSEPORT): the kernel spreads connections over them.
They share nothing else; each has streams of its own to the workers.
"""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tandem.commands.gateway_process import GatewayProcess
from tandem.commands.terminal import errors
from tandem.core.config import TandemConfig
from tandem.core.errors import UnavailableError

WATCH_INTERVAL = 1.0
MIN_LIFE = 10.0
"""A gateway that ends by itself sooner than that would only end again."""


class Gateways:
    """As many as `gateway.processes` says."""

    def __init__(self, config: TandemConfig, controller: str, log_file: Path | None) -> None:
        self._processes = [
            GatewayProcess(config, controller, log_file, index)
            for index in range(config.gateway.processes)
        ]

    def start(self) -> None:
        """Start those that do not run. Call it from the main thread."""
        for process in self._processes:
            if not process.running:
                process.start()

    def exit_code(self) -> int | None:
        """The exit code of one that has ended; None while all run."""
        codes = (process.exit_code() for process in self._processes)
        return next((code for code in codes if code is not None), None)

    def is_ready(self) -> bool:
        """Whether every one would serve a request now."""
        return all(process.is_ready() for process in self._processes)

    def last_words(self) -> str:
        """The last line of their log, where they have one."""
        return self._processes[0].last_words()

    def stop(self) -> None:
        """End all at once: a moment for streams to finish, then they are cut."""
        with ThreadPoolExecutor(len(self._processes)) as pool:
            list(pool.map(GatewayProcess.stop, self._processes))


def run_gateways(config: TandemConfig, controller: str) -> None:
    """Run several gateways until SIGTERM or SIGINT; one that ends is started again.

    Raises `UnavailableError` if one ends by itself before it has run for a while.
    """
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    gateways = Gateways(config, controller, None)
    try:
        gateways.start()
        started = time.monotonic()
        while not asked.wait(WATCH_INTERVAL):
            code = gateways.exit_code()
            if code is None:
                continue
            if code > 0 and time.monotonic() - started < MIN_LIFE:
                raise UnavailableError("a gateway keeps ending; see its output")
            errors.print(f"a gateway ended (exit code {code}), starting it again")
            gateways.start()
            started = time.monotonic()
    finally:
        gateways.stop()
