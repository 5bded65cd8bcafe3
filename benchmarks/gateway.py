"""What the path from a decode worker to a client costs: `make bench-gateway`.

Decode workers that replay tokens (`benchmarks.replay`) stand behind real gateway processes; a light
client (`benchmarks.many_streams`) holds the streams. The same client on a server that only writes
(`benchmarks.bare_server`) is the bound, in the same run. All of it is on one machine and one
monotonic clock. Prints one markdown table; a cell is the median over runs, its range in
parentheses.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any
from urllib.error import URLError
from urllib.request import urlopen

import psutil

from benchmarks import bare_server, many_streams, replay
from benchmarks.machine import describe_machine
from benchmarks.measures import percentile, spread

HOST = "127.0.0.1"
READY_SECONDS = 60.0
RUN_SECONDS = 120.0
REQUESTS_ONE_BY_ONE = 300
Figures = dict[str, float | None]


@dataclass(frozen=True)
class Load:
    """One line of the table."""

    streams: int
    rate: float
    """Tokens per second of each stream."""
    gateways: int
    """Gateway processes on one port; 0: the bare server."""
    endpoint: str
    seconds: float

    @property
    def label(self) -> str:
        who = "bare writes" if not self.gateways else f"{self.gateways} x gateway {self.endpoint}"
        return f"{who}, {self.streams} x {self.rate:g}/s"


def measure(load: Load, model: Path) -> Figures:
    """Run one load on fresh processes and return its figures."""
    job = replay.ReplayJob(load.streams, int(load.rate * load.seconds), load.rate)
    with _servers(load, job, model) as (lines, port, servers):
        client_job = many_streams.ClientJob(HOST, port, load.streams, job.tokens, load.endpoint)
        with _process(many_streams.command(client_job)) as client:
            assert client.stdout is not None
            json.loads(lines.readline())
            server_cpu, client_cpu = _cpu(*servers), _cpu(client.pid)
            sent = json.loads(lines.readline())["sent"]
            time.sleep(0.3)
            server_cpu, client_cpu = _cpu(*servers) - server_cpu, _cpu(client.pid) - client_cpu
            arrivals = json.loads(client.stdout.read())["arrivals"]
    tokens = load.streams * job.tokens
    last = max(stream[-1][0] for stream in arrivals)
    added = _added_seconds(sent, arrivals)
    return {
        "tokens_per_second": tokens / (last - sent[0]),
        "cpu_us": server_cpu / tokens * 1e6,
        "client_cpu_us": client_cpu / tokens * 1e6,
        "added_p50": percentile(added, 50),
        "added_p99": percentile(added, 99),
        "tokens_per_read": tokens / sum(len(stream) for stream in arrivals),
    }


def measure_requests(load: Load, model: Path) -> Figures:
    """Send requests of one token one by one, which the worker answers at once."""
    job = replay.ReplayJob(0, 1, 1.0)
    with _servers(load, job, model) as (_, port, _servers_pids):
        client_job = many_streams.ClientJob(
            HOST, port, REQUESTS_ONE_BY_ONE, 1, load.endpoint, one_by_one=True
        )
        with _process(many_streams.command(client_job)) as client:
            assert client.stdout is not None
            seconds = json.loads(client.stdout.read())["seconds"]
    return {
        "added_p50": percentile(seconds, 50) or 0.0,
        "added_p99": percentile(seconds, 99) or 0.0,
    }


def _added_seconds(sent: list[float], arrivals: list[list[tuple[float, int]]]) -> list[float]:
    """Return for each token the time from leaving the worker to arriving at the client."""
    added: list[float] = []
    for stream in arrivals:
        index = 0
        for when, count in stream:
            added.extend(when - left for left in sent[index : index + count])
            index += count
    return added


@contextmanager
def _servers(
    load: Load, job: replay.ReplayJob, model: Path
) -> Iterator[tuple[IO[str], int, list[int]]]:
    """Start what the load needs: the lines of the source, the port, the measured processes."""
    with ExitStack() as stack:
        source_command = replay.command(job, model) if load.gateways else bare_server.command(job)
        source = stack.enter_context(_process(source_command))
        assert source.stdout is not None
        address = json.loads(source.stdout.readline())["address"]
        if not load.gateways:
            yield source.stdout, int(address.rpartition(":")[2]), [source.pid]
            return
        port, grpc_port, own_port = _free_ports(3)
        command = [sys.executable, "-m", "tandem", "gateway", "--controller", address]
        command += ["--port", str(port), "--grpc-port", str(grpc_port), "--log-level", "error"]
        command += ["--gateways", str(load.gateways), "--metrics-port", str(own_port)]
        gateway = stack.enter_context(_process(command))
        ports = [own_port + n for n in range(load.gateways)] if load.gateways > 1 else [port]
        for each in ports:
            _wait_until_ready(each, gateway)
        yield source.stdout, port, _family(gateway.pid)


@contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def _family(pid: int) -> list[int]:
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def _wait_until_ready(port: int, gateway: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and gateway.poll() is None:
        try:
            with urlopen(f"http://{HOST}:{port}/ready", timeout=5):
                return
        except (URLError, ConnectionError):
            time.sleep(0.05)
    raise RuntimeError("the gateway did not become ready")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind((HOST, 0))
        return [int(probe.getsockname()[1]) for probe in sockets]


def _cpu(*pids: int) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return float(sum(each.user + each.system for each in times))


_COLUMNS = (
    ("tokens / s", "tokens_per_second", 1.0, "{:.0f}"),
    ("server CPU, us / token", "cpu_us", 1.0, "{:.1f}"),
    ("client CPU, us / token", "client_cpu_us", 1.0, "{:.1f}"),
    ("added p50, ms", "added_p50", 1e3, "{:.2f}"),
    ("added p99, ms", "added_p99", 1e3, "{:.2f}"),
    ("tokens / read", "tokens_per_read", 1.0, "{:.2f}"),
)


def _row(label: str, runs: list[Figures]) -> str:
    cells = []
    for _, name, factor, form in _COLUMNS:
        found = spread(runs, name)
        if found is None:
            cells.append("")
        else:
            figures = (found.median, found.low, found.high)
            middle, low, high = (form.format(figure * factor) for figure in figures)
            cells.append(f"{middle} ({low}-{high})")
    return f"| {label} | " + " | ".join(cells) + " |"


def _loads(options: argparse.Namespace) -> list[Load]:
    rates = [float(rate) for rate in options.rates.split(",")]
    return [
        Load(options.streams, rate, gateways, options.endpoint, options.seconds)
        for rate in rates
        for gateways in (0, options.gateways)
    ]


def main() -> None:
    """Run every load in turn, as often as asked, and print the table."""
    parser = argparse.ArgumentParser(prog="bench-gateway", description=__doc__.split("\n")[0])
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--rates", default="25,100,150", help="tokens per second of one stream")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of one run")
    parser.add_argument("--gateways", type=int, default=1, help="gateway processes on one port")
    parser.add_argument("--endpoint", choices=("completions", "chat"), default="completions")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    results: dict[str, list[Figures]] = {}
    machine: dict[str, Any] = describe_machine()
    with TemporaryDirectory(prefix="tandem-bench-") as name:
        model = Path(name)
        replay.write_model(model)
        for _ in range(options.runs):
            for load in _loads(options):
                results.setdefault(load.label, []).append(measure(load, model))
            for gateways in (0, options.gateways):
                load = Load(1, 0.0, gateways, options.endpoint, 0.0)
                label = load.label.partition(",")[0] + ", a whole request of one token"
                results.setdefault(label, []).append(measure_requests(load, model))
    print(f"{machine['date']}, {machine['cpu']}, {machine['cores']} cores, ", end="")
    print(f"load average {machine['load_average']} before and {os.getloadavg()[0]:.1f} after\n")
    print("| load | " + " | ".join(title for title, *_ in _COLUMNS) + " |")
    print("|---" * (len(_COLUMNS) + 1) + "|")
    for label, runs in results.items():
        print(_row(label, runs))


if __name__ == "__main__":
    main()
