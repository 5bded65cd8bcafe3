"""KV of a prompt from one process to another on the same device, through `tandem.transfer`.

NCCL first, as between GPUs; then gloo over pinned host memory, which every machine has. What
arrives must equal what was sent.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.gpu.harness import Machine, Result, SkippedError
from benchmarks.gpu.peer import Receiver, check_nccl, digest, pieces
from tandem.kvcache.storage import KVStorage


def run(machine: Machine, result: Result) -> None:
    backends = ("nccl", "gloo") if machine.cuda else ("gloo",)
    for backend in backends:
        if backend == "nccl":
            try:
                check_nccl()
            except SkippedError as reason:
                result.notes.append(str(reason))
                continue
        with result.guard(backend):
            _stream(machine, result, backend)


def _stream(machine: Machine, result: Result, backend: str) -> None:
    layers, heads, head_dim, tokens = (4, 2, 16, 64) if machine.small else (32, 8, 128, 4096)
    dtype = torch.bfloat16 if machine.cuda else torch.float32
    storage = KVStorage(layers, 2 * tokens // 16, 16, heads, head_dim, dtype, machine.device)
    storage.kv.normal_()
    slots = torch.randperm(2 * tokens, device=machine.device)[:tokens]
    with Receiver(machine, storage, backend) as receiver:
        times = []
        for leg_id in range(1, 5):  # the first opens the link
            receiver.expect(leg_id, 0, slots)
            machine.synchronize()
            started = time.perf_counter()
            receiver.transfer.open_sends(leg_id)
            for piece in pieces(storage, leg_id, slots, groups=4):
                receiver.transfer.send(piece)
            receiver.transfer.finish_sends(leg_id)
            receiver.events.wait_sent(leg_id)
            times.append(time.perf_counter() - started)
        equal = receiver.digest(slots) == digest(storage.kv, slots)
        stats = receiver.transfer.stats()
    result.check(equal, f"{backend}: what arrived is not what was sent")
    nbytes = tokens * storage.bytes_per_token
    best: Any = min(times[1:])
    result.values[backend] = {"seconds": times, "bytes": nbytes}
    result.rows.append(
        {
            "backend": backend,
            "tokens": tokens,
            "MB": nbytes / 1e6,
            "first leg, ms (opens the link)": 1e3 * times[0],
            "best of the others, ms": 1e3 * best,
            "GB/s, with packing and acknowledgement": nbytes / best / 1e9,
            "GB/s on the wire": stats.bytes_sent / max(stats.send_seconds, 1e-9) / 1e9,
            "equal": equal,
        }
    )
