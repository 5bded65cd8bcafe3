"""A second process on the same device that receives KV, and the first one's side of it.

Both ends are `tandem.transfer` as the workers use it; only the control stream is a pipe in place of
gRPC. The receiver's blocks start as zeros.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.harness import Machine, SkippedError
from tandem.core.config import TransferConfig
from tandem.kvcache.storage import KVStorage
from tandem.transfer import LinkBudget, PeerTransfer, Piece, Rendezvous, make_kv_spec
from tandem.v1 import worker_pb2

WAIT_SECONDS = 40.0
NCCL_NEEDED = (2, 30)


def check_nccl() -> None:
    """Raise `SkippedError` where two ranks cannot share this device over NCCL, saying why."""
    version = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    if tuple(version) < NCCL_NEEDED:
        raise SkippedError(
            f"two NCCL ranks cannot share one GPU here: NCCL is {'.'.join(map(str, version))}, "
            "2.30 or newer is needed (run.py --nccl names another libnccl.so.2)"
        )
    if os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
        raise SkippedError(
            "two NCCL ranks cannot share one GPU: NCCL_MULTI_RANK_GPU_ENABLE is not 1"
        )


class Events:
    """A `TransferEvents` that remembers and wakes who waits."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.closed: dict[int, str | None] = {}
        self.failures: list[str] = []
        self.landed_at = 0.0

    def piece_landed(self, *_: Any) -> None:
        self.landed_at = time.perf_counter()

    def sends_closed(self, leg_id: int, error: str | None) -> None:
        with self._changed:
            self.closed[leg_id] = error
            self._changed.notify_all()

    def receives_closed(self, leg_id: int) -> None:
        """The receiver's leg ends with the process."""

    def link_failed(self, leg_ids: Sequence[int], reason: str) -> None:
        with self._changed:
            self.failures.append(reason)
            self._changed.notify_all()

    def wait_sent(self, leg_id: int) -> None:
        """Until every piece is acknowledged. Raises RuntimeError if it failed or takes too long."""
        with self._changed:
            done = self._changed.wait_for(
                lambda: leg_id in self.closed or bool(self.failures), WAIT_SECONDS
            )
        reasons = [*self.failures, *([self.closed[leg_id]] if self.closed.get(leg_id) else [])]
        if not done or reasons:
            raise RuntimeError(str(reasons[0]) if reasons else "no acknowledgement in time")


def _transfer(storage: KVStorage, backend: str, send: Any, events: Any, peer: str) -> PeerTransfer:
    config = TransferConfig(backend=backend, max_retries=0)  # type: ignore[arg-type]
    return PeerTransfer(
        storage,
        make_kv_spec("benchmark", "r1", storage, config),
        config,
        send,
        events,
        peer,
        budget=LinkBudget(4),
        rendezvous=Rendezvous("127.0.0.1"),
    )


class Receiver:
    """The other process, and our link to it. A context manager."""

    def __init__(self, machine: Machine, storage: KVStorage, backend: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        shape = tuple(storage.kv.shape)
        arguments = (theirs, shape, str(storage.dtype), str(machine.device), backend)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self._lock = threading.Lock()
        self._answers: list[Any] = []
        self._answered = threading.Condition()
        self.events = Events()
        self.transfer = _transfer(storage, backend, self._send_link, self.events, "receiver")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.ask("ready")

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *_: object) -> None:
        self.transfer.close()
        self._process.kill()
        self._process.join(10)

    def expect(self, leg_id: int, start: int, slots: Tensor) -> None:
        self.ask("expect", leg_id, start, slots.tolist())

    def digest(self, slots: Tensor) -> list[float]:
        """`digest` of the receiver's blocks."""
        return list(self.ask("digest", slots.tolist()))

    def ask(self, *command: Any) -> Any:
        self._tell(*command)
        with self._answered:
            if not self._answered.wait_for(lambda: bool(self._answers), WAIT_SECONDS):
                raise RuntimeError(f"the receiving process did not answer {command[0]!r}")
            return self._answers.pop()

    def _tell(self, *command: Any) -> None:
        with self._lock:
            self._pipe.send(command)

    def _send_link(self, message: worker_pb2.LinkMessage) -> None:
        self._tell("link", message.SerializeToString())

    def _read(self) -> None:
        while True:
            try:
                kind, value = self._pipe.recv()
            except (EOFError, OSError):
                return
            if kind == "link":
                self.transfer.handle(worker_pb2.LinkMessage.FromString(value))
            else:
                with self._answered:
                    self._answers.append(value)
                    self._answered.notify_all()


def digest(kv: Tensor, slots: Tensor) -> list[float]:
    """Per layer, the slots' bytes summed with weights that depend on their place; exact."""
    rows = kv.flatten(2, 3).index_select(2, slots.to(kv.device)).contiguous()
    sums = []
    for layer in rows:
        words = layer.flatten().view(torch.int16).to(torch.int64)
        weights = torch.arange(words.numel(), device=words.device) % 8191 + 1
        sums.append(float((words * weights).sum() % (1 << 50)))
    return sums


def pieces(
    storage: KVStorage, leg_id: int, slots: Tensor, groups: int, ready: Any = None
) -> list[Piece]:
    """All layers of the slots, in groups of layers."""
    size = -(-storage.num_layers // groups)
    return [
        Piece(leg_id, 0, first, min(size, storage.num_layers - first), 0, slots, ready)
        for first in range(0, storage.num_layers, size)
    ]


def _serve(pipe: Connection, shape: tuple[int, ...], dtype: str, device: str, backend: str) -> None:
    layers, _, blocks, block_size, heads, head_dim = shape
    kind = getattr(torch, dtype.removeprefix("torch."))
    storage = KVStorage(layers, blocks, block_size, heads, head_dim, kind, device)
    lock = threading.Lock()

    def tell(kind: str, value: Any) -> None:
        with lock:
            pipe.send((kind, value))

    def send(message: worker_pb2.LinkMessage) -> None:
        tell("link", message.SerializeToString())

    transfer = _transfer(storage, backend, send, Events(), "sender")
    while True:
        try:
            kind, *values = pipe.recv()
        except EOFError:
            return
        if kind == "link":
            transfer.handle(worker_pb2.LinkMessage.FromString(values[0]))
        elif kind == "expect":
            transfer.expect(values[0], values[1], torch.tensor(values[2], device=device))
            tell("answer", None)
        elif kind == "digest":
            tell("answer", digest(storage.kv, torch.tensor(values[0])))
        else:
            tell("answer", kind)
