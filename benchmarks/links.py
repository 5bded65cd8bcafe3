"""What a KV link makes of the wire: `make bench-links`.

Two processes with the real transfer stack between them: blocks, packing, staging, gloo over the
loopback, scattering, and control messages over a gRPC stream. Many small pieces and few big ones,
against bare gloo sends and receives of the same sizes, one waiting for the other, and against
copying the same bytes in memory, in turns in one run. Prints a table.

The peer is this program too, started with `--peer`: it says where it listens, and ends with us.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, NamedTuple

import grpc
import grpc.aio
import torch

from benchmarks.machine import describe_machine
from tandem.core.config import TransferConfig
from tandem.kvcache.storage import KVStorage
from tandem.transfer import LinkBudget, PeerTransfer, Piece, Rendezvous, make_kv_spec
from tandem.transfer.group import connect_store, dist
from tandem.v1 import worker_pb2
from tandem.worker.event_loop import EventLoopThread, Outbox

HOST = "127.0.0.1"
METHOD = "/bench.Links/Serve"
HEADS, HEAD_DIM, BLOCK_SIZE = 2, 64, 16
"""Of Qwen2.5-0.5B, in bf16: 512 bytes per token and layer."""
PATIENCE = timedelta(seconds=60)


class Load(NamedTuple):
    """Pieces of one leg, as a prompt makes them: chunks of tokens, in groups of layers."""

    name: str
    pieces: int
    tokens: int
    layers: int

    @property
    def nbytes(self) -> int:
        return self.tokens * self.layers * 2 * HEADS * HEAD_DIM * 2


LOADS = (
    Load("small: 16 tokens x 1 layer", 512, 16, 1),
    Load("chunk: 64 tokens x 6 layers", 256, 64, 6),
    Load("big: 1,024 tokens x 8 layers", 24, 1024, 8),
)


class Peer:
    """One process: blocks, a transfer, and a gloo group with nothing around it."""

    def __init__(self, name: str, outbox: Outbox[bytes]) -> None:
        tokens = max(load.tokens for load in LOADS)
        layers = max(load.layers for load in LOADS)
        self.storage = KVStorage(
            layers, tokens // BLOCK_SIZE, BLOCK_SIZE, HEADS, HEAD_DIM, torch.bfloat16, "cpu"
        )
        config = TransferConfig()
        self._arrived = 0
        self.closed: dict[int, Future[str | None]] = {}
        self._outbox = outbox
        self.rendezvous = Rendezvous(HOST)
        self.transfer = PeerTransfer(
            self.storage,
            make_kv_spec("bench", "", self.storage, config),
            config,
            lambda message: outbox.put(message.SerializeToString()),
            self,
            name,
            LinkBudget(8),
            self.rendezvous,
        )

    def slots(self, load: Load) -> torch.Tensor:
        """One per token, in blocks that lie scattered."""
        blocks = torch.randperm(load.tokens // BLOCK_SIZE, generator=torch.Generator())
        return (blocks[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()

    # What the transfer reports.

    def piece_landed(self, leg_id: int, *_: Any) -> None:
        pass

    def sends_closed(self, leg_id: int, error: str | None) -> None:
        self.closed[leg_id].set_result(error)

    def receives_closed(self, leg_id: int) -> None:
        pass

    def link_failed(self, leg_ids: Sequence[int], reason: str) -> None:
        raise RuntimeError(reason)


class Gloo:
    """A bare group of two, as `GlooGroup` makes it."""

    def __init__(self, rank: int, port: int) -> None:
        store = connect_store(HOST, port, "bare", 60.0)
        options = dist.ProcessGroupGloo._Options()
        options._timeout = PATIENCE
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=HOST)]
        self._peer = 1 - rank
        self._group = dist.ProcessGroupGloo(store, rank, 2, options)

    def send(self, buffer: torch.Tensor) -> None:
        self._group.send([buffer], self._peer, 0).wait(PATIENCE)

    def recv(self, buffer: torch.Tensor) -> None:
        self._group.recv([buffer], self._peer, 0).wait(PATIENCE)


# ---------------------------------------------------------------- the receiver's process


class Receiver:
    """Takes commands over the control stream, as well as the link's messages."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.outbox: Outbox[bytes] = Outbox(loop)
        self._peer = Peer("sender", self.outbox)
        self._gloo: Gloo | None = None

    async def serve(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        reader = asyncio.create_task(self._read(requests))
        async for message in self.outbox:
            yield message
        await reader

    async def _read(self, requests: AsyncIterator[bytes]) -> None:
        async for message in requests:
            if not message.startswith(b"{"):
                self._peer.transfer.handle(worker_pb2.LinkMessage.FromString(message))
                continue
            command = json.loads(message)
            if command["do"] == "expect":
                load = LOADS[command["load"]]
                # Positions are many, and blocks few: the same ones over and over.
                slots = self._peer.slots(load).repeat(load.pieces)
                self._peer.transfer.expect(command["leg"], 0, slots)
            else:
                threading.Thread(target=self._bare, args=(command,), daemon=True).start()

    def _bare(self, command: dict[str, Any]) -> None:
        if self._gloo is None:
            self._gloo = Gloo(1, command["port"])
        load = LOADS[command["load"]]
        buffer = torch.empty(load.nbytes, dtype=torch.uint8)
        for _ in range(load.pieces):
            self._gloo.recv(buffer)


async def serve_peer() -> None:
    """The child: print the port, and serve until our end of its input closes."""
    torch.set_num_threads(1)
    receiver = Receiver(asyncio.get_running_loop())
    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(receiver.serve)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("bench.Links", {"Serve": handler}),)
    )
    print(server.add_insecure_port(f"{HOST}:0"), flush=True)
    await server.start()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


# ---------------------------------------------------------------- the sender's process


class Sender:
    """Measures; `control` carries the link's messages and the commands."""

    def __init__(self, port: int) -> None:
        self._events = EventLoopThread("bench")
        self._outbox: Outbox[bytes] = Outbox(self._events.loop)
        self._peer = Peer("receiver", self._outbox)
        self._stream = self._events.spawn(self._control(port))
        self._gloo: Gloo | None = None
        self._leg = 0

    async def _control(self, port: int) -> None:
        async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
            async for message in channel.stream_stream(METHOD)(aiter(self._outbox)):
                self._peer.transfer.handle(worker_pb2.LinkMessage.FromString(message))

    def _tell(self, **command: Any) -> None:
        self._outbox.put(json.dumps(command).encode())

    def link(self, number: int) -> float:
        """Seconds until the last piece of a leg is acknowledged."""
        load, transfer = LOADS[number], self._peer.transfer
        self._leg += 1
        leg, closed = self._leg, Future()  # type: ignore[var-annotated]
        self._peer.closed[leg] = closed
        self._tell(do="expect", leg=leg, load=number)
        slots = self._peer.slots(load)
        began = time.perf_counter()
        transfer.open_sends(leg)
        for chunk in range(load.pieces):
            transfer.send(Piece(leg, chunk, 0, load.layers, chunk * load.tokens, slots))
        transfer.finish_sends(leg)
        if (error := closed.result(120)) is not None:
            raise RuntimeError(error)
        return time.perf_counter() - began

    def gloo(self, number: int) -> float:
        """Seconds for the same sizes over bare gloo, each piece waited for."""
        load = LOADS[number]
        self._tell(do="bare", load=number, port=self._peer.rendezvous.port())
        if self._gloo is None:
            self._gloo = Gloo(0, self._peer.rendezvous.port())
        buffer = torch.zeros(load.nbytes, dtype=torch.uint8)
        self._gloo.send(buffer)  # the receiver is there
        began = time.perf_counter()
        for _ in range(load.pieces - 1):
            self._gloo.send(buffer)
        return (time.perf_counter() - began) * load.pieces / (load.pieces - 1)

    def memcpy(self, number: int) -> float:
        """Seconds for one copy of the same bytes in memory, a thread's."""
        load = LOADS[number]
        source = torch.zeros(load.nbytes, dtype=torch.uint8)
        target = torch.empty_like(source)
        began = time.perf_counter()
        for _ in range(load.pieces):
            target.copy_(source)
        return time.perf_counter() - began

    def close(self) -> None:
        """End the control stream and its thread."""
        self._peer.transfer.close()
        self._peer.transfer.join(5.0)
        self._outbox.close()
        self._events.stop()


def measure(port: int, runs: int) -> list[str]:
    """Rows of the table: every way in turns, `runs` times."""
    sender = Sender(port)
    ways: dict[str, Callable[[int], float]] = {
        "link": sender.link, "gloo": sender.gloo, "memcpy": sender.memcpy
    }  # fmt: skip
    rows = []
    try:
        for number, load in enumerate(LOADS):
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for run in range(runs + 1):
                for way, once in ways.items():
                    taken = once(number)
                    if run:  # the first one opens links and touches memory
                        seconds[way].append(taken)
            rows += [row(load, way, each) for way, each in seconds.items()]
    finally:
        sender.close()
    return rows


def row(load: Load, way: str, seconds: list[float]) -> str:
    """One line: medians, and the range of the runs."""
    pieces = [load.pieces / each for each in seconds]
    rate = statistics.median(pieces)
    return (
        f"| {load.name}, {load.nbytes / 1024:,.0f} KiB | {way} | {rate:,.0f} "
        f"({min(pieces):,.0f}–{max(pieces):,.0f}) | {rate * load.nbytes / 1e6:,.0f} |"
    )


def main() -> None:
    """Start the peer, measure, print."""
    parser = argparse.ArgumentParser(prog="bench-links", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=7, help="of each way and size, in turns")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        asyncio.run(serve_peer())
        return
    torch.set_num_threads(1)
    machine = describe_machine()
    command = [sys.executable, "-m", "benchmarks.links", "--peer"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as peer:
        assert peer.stdout is not None
        rows = measure(int(peer.stdout.readline()), options.runs)
        peer.communicate()
    before = f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_average']} before"
    print(f"{machine['date']}, {before}; medians of {options.runs} runs in turns\n")
    print("| pieces | way | pieces/s (range) | MB/s |\n|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
