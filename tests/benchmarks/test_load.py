"""The load client against a server that streams like the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from benchmarks.load import LoadJob, read_job, read_result, replay, write_job, write_result
from benchmarks.workload import PlannedRequest

Serve = Callable[..., AbstractAsyncContextManager[Any]]


def job(port: int, *sizes: int, timeout: float = 20.0) -> LoadJob:
    requests = tuple(
        PlannedRequest(index, 0.0, (1, 2, 3), size, shared=False)
        for index, size in enumerate(sizes)
    )
    return LoadJob("127.0.0.1", port, "tiny", timeout, 0, requests)


@pytest.mark.parametrize("piece_bytes", [1, 7, 1 << 20])
async def test_every_token_is_counted_however_the_bytes_arrive(
    serve: Serve, piece_bytes: int
) -> None:
    async with serve(piece_bytes=piece_bytes) as gateway:
        records, _ = await replay(job(gateway.port, 5, 1))

    assert [len(record.token_times) for record in records] == [5, 1]
    assert all(record.ok for record in records)
    assert all(record.prompt_tokens == 3 and record.cached_tokens == 16 for record in records)
    assert list(records[0].token_times) == sorted(records[0].token_times)
    assert all(record.ttft > 0 for record in records)


async def test_tokens_of_one_event_share_its_time(serve: Serve) -> None:
    async with serve(tokens_per_event=3) as gateway:
        (record,), _ = await replay(job(gateway.port, 6))

    assert record.ok
    assert record.gaps[:2] == [0.0, 0.0]


async def test_requests_are_greedy_streams_of_token_ids(serve: Serve) -> None:
    async with serve() as gateway:
        await replay(job(gateway.port, 4))

    body = gateway.bodies[0]
    assert body["prompt"] == [1, 2, 3]
    assert body["ignore_eos"] is True
    assert body["max_tokens"] == 4
    assert body["stream_options"] == {"include_usage": True}


async def test_a_refusal_is_an_error_with_its_status(serve: Serve) -> None:
    async with serve(status=b"404 Not Found") as gateway:
        (record,), _ = await replay(job(gateway.port, 4))

    assert "HTTP 404" in record.error
    assert "no such model" in record.error


async def test_an_answer_without_its_end_is_an_error(serve: Serve) -> None:
    async with serve(truncate=True) as gateway:
        (record,), _ = await replay(job(gateway.port, 4))

    assert len(record.token_times) == 4
    assert "before the answer did" in record.error


async def test_a_stream_that_stands_still_is_given_up(serve: Serve) -> None:
    async with serve(hang=True) as gateway:
        (record,), _ = await replay(job(gateway.port, 4, timeout=0.3))

    assert len(record.token_times) == 1
    assert "no end after" in record.error


async def test_no_server_is_an_error_of_every_request(unused_tcp_port: int) -> None:
    records, _ = await replay(job(unused_tcp_port, 2, 2))

    assert all("cannot connect" in record.error for record in records)


class PrefillServer:
    """Says where the KV lies, or refuses."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        self.bodies.append(orjson.loads(await reader.readexactly(length)))
        writer.write(self.answer)
        await writer.drain()
        writer.close()


async def test_a_pair_computes_the_prompt_first_and_hands_its_place_on(serve: Serve) -> None:
    prefill = PrefillServer(b'HTTP/1.1 200 OK\r\n\r\n{"kv_transfer_params": {"remote_port": 7}}')
    server = await asyncio.start_server(prefill.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, serve() as decode:
        (record,), _ = await replay(replace(job(decode.port, 4), prefill_port=port))

    assert record.ok
    assert prefill.bodies[0]["max_tokens"] == 1
    assert prefill.bodies[0]["kv_transfer_params"]["do_remote_decode"] is True
    assert decode.bodies[0]["kv_transfer_params"] == {"remote_port": 7}
    assert decode.bodies[0]["prompt"] == prefill.bodies[0]["prompt"]


async def test_a_prefill_server_that_refuses_fails_its_request(serve: Serve) -> None:
    prefill = PrefillServer(b"HTTP/1.1 500 Internal\r\n\r\nno memory")
    server = await asyncio.start_server(prefill.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, serve() as decode:
        (record,), _ = await replay(replace(job(decode.port, 4), prefill_port=port))

    assert "no memory" in record.error
    assert decode.bodies == []


async def test_fields_that_only_one_server_knows_are_sent(serve: Serve) -> None:
    async with serve() as gateway:
        await replay(replace(job(gateway.port, 2), extra={"cache_prompt": False}))

    assert gateway.bodies[0]["cache_prompt"] is False


async def test_jobs_and_results_survive_their_files(serve: Serve, tmp_path: Path) -> None:
    async with serve() as gateway:
        wanted = job(gateway.port, 3)
        write_job(tmp_path / "job", wanted)
        records, cost = await replay(read_job(tmp_path / "job"))
        write_result(tmp_path / "result", records, cost)

    assert read_job(tmp_path / "job") == wanted
    assert read_result(tmp_path / "result") == (records, cost)
