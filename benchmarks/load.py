"""The load client: sends a workload at its times and writes down when every token came.

A process of its own (`python -m benchmarks.load WORKLOAD RESULT`), at the lowest priority (nice 19)
so that it takes no time from the servers when the cores are few. What that costs in accuracy is
measured: a timer runs beside the requests, and how late it fires is how late tokens are stamped.
Open loop: a request is sent when it is due, however many are still in flight.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson
import uvloop

from benchmarks.measures import RequestRecord, percentile
from benchmarks.pair import PairError, prefill_elsewhere
from benchmarks.stream import CompletionStream, StreamedAnswer, completion_request
from benchmarks.workload import PlannedRequest

NICENESS = 19
PROBE_INTERVAL = 0.02


@dataclass(frozen=True)
class LoadJob:
    """What the client is told."""

    host: str
    port: int
    model: str
    timeout: float
    """Seconds that one request may take."""
    niceness: int
    requests: tuple[PlannedRequest, ...]
    prefill_port: int = 0
    """Where prompts are computed first, before vLLM's decode server at `port`; 0: nowhere."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields of every request that only this server knows."""


@dataclass(frozen=True)
class ClientCost:
    """What the client itself took."""

    niceness: int
    cpu_seconds: float
    core_share: float
    """Part of one core that it used while it ran."""
    lag_p50: float | None
    """Seconds by which a timer in the client's event loop fired late."""
    lag_p99: float | None
    send_delay_p99: float | None
    """Seconds by which requests were sent late."""


async def replay(job: LoadJob) -> tuple[list[RequestRecord], ClientCost]:
    """Send every request when it is due and wait for all answers."""
    payloads = [_payload(job, request, {}) for request in job.requests]
    lags: list[float] = []
    probe = asyncio.create_task(_probe(lags))
    cpu, start = time.process_time(), time.perf_counter()
    pairs = zip(job.requests, payloads, strict=True)
    tasks = [_send(job, request, payload, start) for request, payload in pairs]
    records = list(await asyncio.gather(*tasks))
    cpu, seconds = time.process_time() - cpu, time.perf_counter() - start
    probe.cancel()
    delays = [record.sent_at - record.scheduled_at for record in records]
    cost = ClientCost(
        niceness=os.nice(0),
        cpu_seconds=cpu,
        core_share=cpu / seconds,
        lag_p50=percentile(lags, 50),
        lag_p99=percentile(lags, 99),
        send_delay_p99=percentile(delays, 99),
    )
    return records, cost


async def _send(
    job: LoadJob, request: PlannedRequest, payload: bytes, start: float
) -> RequestRecord:
    """Send one request at its time. The clock of TTFT starts before the connection is made."""
    await asyncio.sleep(max(0.0, start + request.at - time.perf_counter()))
    sent_at = time.perf_counter()
    answer = await (_pair(job, request) if job.prefill_port else _stream(job, payload))
    return RequestRecord(
        index=request.index,
        scheduled_at=request.at,
        sent_at=sent_at - start,
        token_times=tuple(moment - start for moment in answer.token_times),
        expected_tokens=request.max_tokens,
        prompt_tokens=answer.prompt_tokens or len(request.prompt),
        cached_tokens=answer.cached_tokens,
        error=answer.error,
    )


def _payload(job: LoadJob, request: PlannedRequest, more: dict[str, Any]) -> bytes:
    return completion_request(
        job.host, job.model, request.prompt, request.max_tokens, {**job.extra, **more}
    )


async def _pair(job: LoadJob, request: PlannedRequest) -> StreamedAnswer:
    """Send one request to a prefill server, then to its decode server."""
    try:
        async with asyncio.timeout(job.timeout):
            more = await prefill_elsewhere(job.host, job.prefill_port, job.model, request.prompt)
    except (OSError, PairError) as error:  # a timeout is an OSError too
        return StreamedAnswer(error=f"prefill: {error or 'no end'}")
    return await _stream(job, _payload(job, request, more))


async def _stream(job: LoadJob, payload: bytes) -> StreamedAnswer:
    loop = asyncio.get_running_loop()
    try:
        _, stream = await loop.create_connection(
            lambda: CompletionStream(payload), job.host, job.port
        )
    except OSError as error:
        return StreamedAnswer(error=f"cannot connect: {error}")
    try:
        async with asyncio.timeout(job.timeout):
            await stream.finished
    except TimeoutError:
        stream.abort(f"no end after {job.timeout:.0f} s")
    return stream.answer


async def _probe(lags: list[float]) -> None:
    """Note how late a timer fires, again and again."""
    while True:
        due = time.perf_counter() + PROBE_INTERVAL
        await asyncio.sleep(PROBE_INTERVAL)
        lags.append(time.perf_counter() - due)


def write_job(path: Path, job: LoadJob) -> None:
    """Write what `read_job` reads."""
    path.write_bytes(orjson.dumps(asdict(job)))


def read_job(path: Path) -> LoadJob:
    """Read a job from its file."""
    content: dict[str, Any] = orjson.loads(path.read_bytes())
    requests = (
        PlannedRequest(**{**item, "prompt": tuple(item["prompt"])}) for item in content["requests"]
    )
    return LoadJob(**{**content, "requests": tuple(requests)})


def write_result(path: Path, records: Sequence[RequestRecord], cost: ClientCost) -> None:
    """Write what `read_result` reads."""
    content = {"records": [asdict(record) for record in records], "client": asdict(cost)}
    path.write_bytes(orjson.dumps(content))


def read_result(path: Path) -> tuple[list[RequestRecord], ClientCost]:
    """Read a result from its file."""
    content: dict[str, Any] = orjson.loads(path.read_bytes())
    records = [
        RequestRecord(**{**item, "token_times": tuple(item["token_times"])})
        for item in content["records"]
    ]
    return records, ClientCost(**content["client"])


def main() -> None:
    """Run one job: arguments are the workload's file and where the result goes."""
    job = read_job(Path(sys.argv[1]))
    os.nice(job.niceness)
    gc.freeze()
    gc.disable()
    records, cost = uvloop.run(replay(job))
    write_result(Path(sys.argv[2]), records, cost)


if __name__ == "__main__":
    main()
