"""A local cluster from first to last: what `tandem serve` does once the configuration is settled.

Order of start: reaper, Ray, controller (which starts the workers), gateway. Order of stop: the
reverse. Whatever happens in between, `run` leaves no process, port or shared memory behind.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from tandem.commands.gateways import Gateways
from tandem.commands.hints import print_hints
from tandem.commands.progress import ClusterView, StartProgress, describe, state_name
from tandem.commands.reaper import Reaper
from tandem.commands.start import everyone_ready
from tandem.commands.terminal import console, errors
from tandem.controller.environment import prepare_environment
from tandem.core.config import TandemConfig
from tandem.core.errors import ConfigError, ModelLoadError, UnavailableError

if TYPE_CHECKING:
    from tandem.controller.session import ControllerHandle, RayCluster

POLL_INTERVAL = 0.25
WATCH_INTERVAL = 1.0
MIN_GATEWAY_LIFE = 10.0
EXIT_BY_SIGNAL = 130


class Interrupts:
    """Ctrl-C, SIGTERM and SIGHUP: the first asks for an orderly stop, the second kills at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.asked = threading.Event()

    def install(self) -> None:
        """Take the signals over; again after Ray has put its own handlers in place."""
        for number in self.SIGNALS:
            signal.signal(number, self._handle)

    def check(self) -> None:
        """Raise `KeyboardInterrupt` once a stop was asked for."""
        if self.asked.is_set():
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked.is_set() and number == signal.SIGINT:
            os._exit(EXIT_BY_SIGNAL)  # the reaper sees the pipe close and kills what is left
        self.asked.set()


class Supervisor:
    """One local cluster with its gateway."""

    def __init__(self, config: TandemConfig, ray_address: str) -> None:
        self._config = config
        self._ray_address = ray_address
        self._interrupts = Interrupts()
        self._states: dict[str, str] = {}
        self._logs: Path | None = None

    def run(self) -> None:
        """Serve until told to stop. Raises `TandemError` if the cluster cannot start or go on."""
        self._interrupts.install()
        reaper = Reaper()
        try:
            with self._ray(reaper) as cluster, self._controller(cluster) as (handle, view):
                gateway = Gateways(self._config, handle.address(), self._gateway_log())
                try:
                    self._start(handle, view, gateway)
                    print_hints(self._config, cluster.dashboard)
                    self._watch(view, gateway)
                finally:
                    self._say_stopping()
                    gateway.stop()
        except KeyboardInterrupt:
            pass
        except (ModelLoadError, ConfigError):
            raise  # its message says all; the logs add nothing
        except BaseException:
            reaper.disown_directories()
            if self._logs is not None:
                errors.print(f"logs are kept in {self._logs}", markup=False, soft_wrap=True)
            raise
        finally:
            reaper.finish()
        console.print("stopped")

    @contextmanager
    def _ray(self, reaper: Reaper) -> Iterator[RayCluster]:
        with console.status("starting Ray"):
            prepare_environment()
            from tandem.controller import session

            if self._ray_address:
                cluster = session.connect_to_ray(self._ray_address)
            else:
                cluster = session.start_local_ray(self._config)
        self._interrupts.install()
        if cluster.session_dir is not None:
            reaper.own_directory(cluster.session_dir)
            self._logs = cluster.session_dir / "logs"
        try:
            self._interrupts.check()
            yield cluster
        finally:
            session.disconnect()

    @contextmanager
    def _controller(self, cluster: RayCluster) -> Iterator[tuple[ControllerHandle, ClusterView]]:
        from tandem.controller import session

        handle = session.start_controller(self._config, cluster)
        try:
            view = ClusterView(handle.address())
            try:
                yield handle, view
            finally:
                view.close()
        finally:
            handle.stop()

    def _start(self, handle: ControllerHandle, view: ClusterView, gateway: Gateways) -> None:
        """Return once the gateway would serve a request and every worker is ready."""
        gateway.start()
        with StartProgress(console).shown() as progress:
            progress.stage("starting workers and gateway")
            while not everyone_ready(handle, view, progress) or not gateway.is_ready():
                self._interrupts.check()
                if gateway.exit_code() is not None:
                    raise UnavailableError(f"the gateway ended: {gateway.last_words()}")
                self._interrupts.asked.wait(POLL_INTERVAL)

    def _watch(self, view: ClusterView, gateway: Gateways) -> None:
        """Tell what changes, and bring a fallen gateway back, until asked to stop."""
        started = time.monotonic()
        while not self._interrupts.asked.wait(WATCH_INTERVAL):
            status = view.status(timeout=WATCH_INTERVAL)
            for worker in status.workers if status is not None else ():
                state = state_name(worker)
                before, self._states[worker.name] = self._states.get(worker.name, "ready"), state
                if state != before:
                    console.print(f"{worker.name}: {describe(worker)}", markup=False)
            code = gateway.exit_code()
            if code is None:
                continue
            if time.monotonic() - started < MIN_GATEWAY_LIFE:
                raise UnavailableError(f"the gateway keeps ending: {gateway.last_words()}")
            errors.print(f"the gateway ended (exit code {code}), starting it again")
            gateway.start()
            started = time.monotonic()

    def _say_stopping(self) -> None:
        if self._interrupts.asked.is_set():
            console.print("stopping; press ctrl-C again to kill everything at once")

    def _gateway_log(self) -> Path | None:
        return self._logs / "gateway.log" if self._logs is not None else None
