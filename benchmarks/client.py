"""Runs the load client in a process of its own and reads what it saw."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.load import ClientCost, LoadJob, read_result, write_job
from benchmarks.measures import RequestRecord

ROOT = Path(__file__).parent.parent


class LoadError(Exception):
    """The load client did not end well, or what it saw cannot be used."""


def run_client(job: LoadJob) -> tuple[list[RequestRecord], ClientCost]:
    """Let the client do its job. Raises `LoadError`; an interrupt kills the client."""
    with TemporaryDirectory(prefix="tandem-load-") as directory:
        workload, result = Path(directory) / "job.json", Path(directory) / "result.json"
        write_job(workload, job)
        client = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.load", str(workload), str(result)],
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            code = client.wait()
        finally:
            with suppress(ProcessLookupError):
                client.kill()
            client.wait()
        if code:
            raise LoadError(f"the load client ended with {code}")
        return read_result(result)
