"""A running `tandem serve`, in a process group of its own as a shell would start it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from free_ports import free_ports

START_SECONDS = 120.0
END_SECONDS = 30.0


class ServeProcess:
    """Starts `tandem serve` on free ports; what it prints goes to `log`."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        self.ports = free_ports(4)
        self.http, self.grpc, self.controller, dashboard = self.ports
        command = [sys.executable, "-m", "tandem", "serve", "--cpus-per-worker", "0.1"]
        command += ["--port", str(self.http), "--grpc-port", str(self.grpc)]
        command += ["--controller-port", str(self.controller)]
        command += ["--dashboard-port", str(dashboard), *arguments]
        self.family: list[psutil.Process] = []
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, text=True, process_group=0
            )

    @property
    def printed(self) -> str:
        """All that it has printed so far."""
        return self.log.read_text()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while "Stop with ctrl-C" not in self.printed:
            assert self.process.poll() is None, self.printed
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.05)
        self.family = self.descendants()

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def interrupt(self) -> None:
        """Ctrl-C: the terminal sends it to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def assert_nothing_is_left(self) -> None:
        assert len(self.family) > 5
        _, alive = psutil.wait_procs(self.family, timeout=END_SECONDS)
        assert [process.cmdline() for process in alive] == []
        for port in self.ports:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))

    def end(self) -> None:
        """Clean up after a test, whatever became of it."""
        if self.process.poll() is None:
            self.interrupt()
            try:
                self.process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
