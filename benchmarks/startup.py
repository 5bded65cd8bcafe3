"""`make bench-startup`: from `tandem serve` on the bundled model to its first answer, by stage.

Prints a markdown table, one column per run, and what Ray takes when it is started by itself. Ray's
part is Ray's processes coming up; the rest is ours. Measures nothing after the first answer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.error import URLError
from urllib.request import Request, urlopen

from benchmarks.launch import HOST, free_ports, serve_environment, stop_cluster
from benchmarks.machine import describe_machine

PATIENCE = 180.0
ASK_INTERVAL = 0.02
STAGES = (
    ("Ray and controller up", "starting workers and gateway"),
    ("first worker process up", "process up"),
    ("first weights loaded", "loading weights"),
    ("first worker ready", "ready"),
)
"""What a stage is called, and the first line of `tandem serve` that says it was reached."""

RAY_ALONE = """
import time
from tandem.controller.environment import prepare_environment
prepare_environment()
from tandem.config import load_config
from tandem.controller import session
config = load_config("", {"controller.dashboard": False, "controller.dashboard_port": 0})
started = time.monotonic()
session.start_local_ray(config)
print(time.monotonic() - started)
session.disconnect()
"""


def ray_alone() -> float:
    """Seconds that Ray takes to start, with nothing of ours in it."""
    environment = serve_environment()
    command = [sys.executable, "-c", RAY_ALONE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def start_once() -> dict[str, float]:
    """Start a cluster; seconds from the command to each stage and to the first answer."""
    http, grpc, controller = free_ports(3)
    ports = ["--port", str(http), "--grpc-port", str(grpc), "--controller-port", str(controller)]
    command = [sys.executable, "-u", "-m", "tandem", "serve", "--no-dashboard", *ports]
    reached: dict[str, float] = {}
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=serve_environment(),
        text=True,
        start_new_session=True,
    )
    with _stopped(process):
        threading.Thread(target=_listen, args=(process, began, reached), daemon=True).start()
        _ask(http, process)
        reached["first answer"] = time.monotonic() - began
    return reached


def _listen(process: subprocess.Popen[str], began: float, reached: dict[str, float]) -> None:
    for line in process.stdout or ():
        for name, said in STAGES:
            if line.rstrip().endswith(said) or f"{said}," in line:
                reached.setdefault(name, time.monotonic() - began)


def _ask(port: int, process: subprocess.Popen[str]) -> None:
    """Ask for one token until there is an answer, as an impatient client would."""
    body = json.dumps({"prompt": "What is Tandem?", "max_tokens": 1}).encode()
    request = Request(
        f"http://{HOST}:{port}/v1/completions", body, {"content-type": "application/json"}
    )
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urlopen(request, timeout=PATIENCE):
                return
        except (URLError, ConnectionError):  # refused, or 503 while nobody serves
            time.sleep(ASK_INTERVAL)
    raise SystemExit("tandem serve did not answer")


@contextmanager
def _stopped(process: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        stop_cluster(process)


def table(runs: list[dict[str, float]]) -> list[str]:
    """Return the lines of the table: seconds since the command."""
    columns = [f"run {number}" for number in range(1, len(runs) + 1)]
    lines = ["| seconds until | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(runs)]
    for name in (*(name for name, _ in STAGES), "first answer"):
        cells = (f"{run[name]:.1f}" if name in run else "" for run in runs)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    print(describe_machine())
    print(f"load average before: {os.getloadavg()[0]:.1f}")
    print(f"Ray alone: {ray_alone():.1f} s\n")
    print("\n".join(table([start_once() for _ in range(runs)])))


if __name__ == "__main__":
    main()
