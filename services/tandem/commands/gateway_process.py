"""The gateway as a child process of `tandem serve`.

It gets its whole configuration on standard input. It lives in a session of its own, so that ctrl-C
in the terminal reaches it only through us, and the kernel kills it when we die.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

import httpx

from tandem.commands.reaper import MARK
from tandem.commands.terminal import reachable
from tandem.config import ENV_PREFIX, dump_config
from tandem.core.config import GatewayConfig, TandemConfig

if TYPE_CHECKING:
    from tandem.gateway.interfaces import MetricsTarget

PR_SET_PDEATHSIG = 1
STOP_TIMEOUT = 3.0
LOG_TAIL_BYTES = 4096


class GatewayProcess:
    """`start`, ask it now and then, `stop`."""

    def __init__(
        self, config: TandemConfig, controller: str, log_file: Path | None, index: int = 0
    ) -> None:
        self._config = config
        self._controller = controller
        self._log_file = log_file
        self._process: subprocess.Popen[str] | None = None
        self._index = index
        port = own_port(config.gateway, index) or config.gateway.port
        self._ready_url = f"http://{reachable(config.gateway.host, port)}/ready"

    def start(self) -> None:
        """Start the process, again if it had ended. Call it from the main thread."""
        command = [sys.executable, "-m", "tandem", "gateway", "--config", "-"]
        command += ["--controller", self._controller, "--parent", str(os.getpid())]
        command += ["--index", str(self._index)]
        # The configuration is complete: the environment must not override what flags decided.
        environment = {k: v for k, v in os.environ.items() if not _is_setting(k)}
        output = self._open_log()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
                text=True,
            )
        finally:
            if output is not None:
                output.close()
        if self._process.stdin is not None:
            with self._process.stdin as stdin:
                stdin.write(dump_config(self._config))

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll() if self._process is not None else None

    def is_ready(self) -> bool:
        """Whether it would serve a request now."""
        try:
            return httpx.get(self._ready_url, timeout=2.0, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def last_words(self) -> str:
        """The last line of its log, where it has one."""
        if self._log_file is None or not self._log_file.exists():
            return ""
        tail = self._log_file.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
        lines = [line.strip() for line in tail.splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def stop(self) -> None:
        """End it: a moment for streams to finish, then they are cut, then it is killed."""
        if self._process is None:
            return
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is not None:
                return
            self._process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=STOP_TIMEOUT)

    def _open_log(self) -> IO[bytes] | None:
        return self._log_file.open("ab") if self._log_file is not None else None


def own_port(config: GatewayConfig, index: int) -> int | None:
    """The port on which one of several gateways answers alone; None if there is only one."""
    return config.metrics_port + index if config.processes > 1 else None


def run_gateway(config: TandemConfig, controller: str, index: int = 0) -> None:
    """Be a gateway, number `index` of those that share the ports, until SIGTERM or SIGINT.

    Raises `ConfigError` if a port is not free.
    """
    from tandem.controller.logs import configure_logging
    from tandem.gateway.dispatch.dispatcher import Dispatcher
    from tandem.gateway.metrics import GatewayMetrics
    from tandem.gateway.server import GatewayServer
    from tandem.gateway.targets import ClusterMetricsTargets
    from tandem.tracing.buffer import TraceBuffer

    configure_logging(config.log_level)
    metrics = GatewayMetrics()
    trace = TraceBuffer(f"gateway-{index}", config.tracing.max_events, always=config.tracing.always)
    dispatcher = Dispatcher(config.gateway, controller, metrics, trace=trace)
    targets = ClusterMetricsTargets(controller, _gateway_targets(config.gateway))
    port = own_port(config.gateway, index)
    GatewayServer(
        config.gateway,
        dispatcher,
        metrics,
        targets=targets,
        own_port=port,
        scheduler=config.scheduler,
        trace=trace,
    ).run()


def _gateway_targets(config: GatewayConfig) -> list[MetricsTarget]:
    """Where each of several gateways answers alone."""
    from tandem.gateway.interfaces import MetricsTarget

    ports = [own_port(config, index) for index in range(config.processes)]
    return [
        MetricsTarget(reachable(config.host, port), f"gateway-{index}", "gateway")
        for index, port in enumerate(ports)
        if port is not None
    ]


def die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent` dies; exit now if it is dead already."""
    if parent == 0:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(1)


def _is_setting(variable: str) -> bool:
    return variable.startswith(ENV_PREFIX) and variable != MARK
