"""The process group of one worker's ranks: sums, and logits to rank 0.

Invariant: an element's sum is taken in the order of the ranks, in float32, whatever the shape of
the tensor that it is in. So the same ranks give the same bits, and a row's result does not depend
on which other rows share its batch. Any error is final: the worker ends.
"""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from tandem.core.errors import UnavailableError
from tandem.engine.parallel.shard import Shard

dist: Any = torch.distributed  # its stubs lack most of what is used here

_SMALL_BYTES = 256 * 1024
"""Up to here every rank sends everything to every other at once; above, each sums one part."""


class RankGroup(Protocol):
    """What a model needs of the ranks that it is divided over."""

    shard: Shard

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of all ranks' tensors of this shape, in x's dtype, on every rank."""

    def gather(self, x: Tensor) -> Tensor:
        """Return [rows, size * columns] on rank 0: the ranks' [rows, columns] side by side. On the
        others, x."""

    def smallest(self, number: int) -> int:
        """Return the least of all ranks' numbers."""


class Alone:
    """A worker of one rank: nothing to do."""

    shard = Shard()

    def sum(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor:
        return x

    def smallest(self, number: int) -> int:
        return number


ALONE = Alone()


class ProcessRanks:
    """Over a torch process group, gloo or NCCL. Used by one thread at a time."""

    def __init__(self, group: Any, shard: Shard, device: torch.device, timeout: float) -> None:
        """timeout: seconds that a rank waits for the others in one operation (gloo)."""
        self.shard = shard
        self._group = group
        self._device = device
        self._timeout = timedelta(seconds=timeout)

    def sum(self, x: Tensor) -> Tensor:
        size = self.shard.size
        if x.numel() * x.element_size() <= _SMALL_BYTES or x.numel() % size:
            return _ordered_sum(self._all_gather(x), x.dtype).view(x.shape)
        parts = torch.empty_like(x, memory_format=torch.contiguous_format).view(size, -1)
        self._wait(self._group.alltoall_base(parts, x.contiguous().view(size, -1), [], []))
        return self._all_gather(_ordered_sum(parts, x.dtype)).view(x.shape)

    def gather(self, x: Tensor) -> Tensor:
        options = dist.GatherOptions()
        options.rootRank = 0
        first = self.shard.rank == 0
        every = [torch.empty_like(x) for _ in range(self.shard.size)] if first else []
        self._wait(self._group.gather([every] if first else [], [x.contiguous()], options))
        return torch.cat(every, dim=1) if first else x

    def smallest(self, number: int) -> int:
        numbers = self._all_gather(torch.tensor([number], dtype=torch.int64, device=self._device))
        return int(numbers.min())

    def abort(self) -> None:
        """End the group; whoever waits in it fails. Any thread."""
        with suppress(RuntimeError):
            self._group.abort()

    def _all_gather(self, x: Tensor) -> Tensor:
        """Return [size, elements]."""
        every = torch.empty((self.shard.size, x.numel()), dtype=x.dtype, device=x.device)
        self._wait(self._group._allgather_base(every, x.contiguous().view(1, -1)))
        return every

    def _wait(self, work: Any) -> None:
        """On CUDA only the stream waits: the graphs of decode iterations hold these operations."""
        try:
            if self._device.type == "cuda":
                work.wait()
            else:
                work.wait(self._timeout)
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UnavailableError(f"the ranks of this worker lost each other: {reason}") from error


def _ordered_sum(every: Tensor, dtype: torch.dtype) -> Tensor:
    """every: [size, elements], one row per rank."""
    total = every[0].float()
    for other in every[1:]:
        total = total + other.float()
    return total.to(dtype)


def own_rows(token_ids: Tensor, rows_per_rank: int, shard: Shard) -> tuple[Tensor, Tensor]:
    """Return the tokens' rows in this rank's part of the vocabulary, and which of them are in it.

    The others' rows are 0, a row that exists. token_ids: int64 [tokens]. Result: int64 and bool.
    """
    rows = token_ids - shard.rank * rows_per_rank
    ours = (rows >= 0) & (rows < rows_per_rank)
    return rows * ours, ours


def serve_store(host: str, timeout: float) -> Any:
    """The store in which ranks meet, on a free port (`store.port`) of rank 0's host.

    timeout: seconds that a rank waits in it for another.
    """
    return dist.TCPStore(
        host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout)
    )


def join_store(host: str, port: int, timeout: float) -> Any:
    """The same store, for another rank."""
    return dist.TCPStore(
        host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout)
    )


def open_ranks(
    store: Any, shard: Shard, device: torch.device, host: str, timeout: float
) -> ProcessRanks:
    """Make the group; every rank calls it with a client of the same store. Blocks until all have.

    Raises `UnavailableError` if a rank does not come within `timeout` seconds.
    """
    try:
        if device.type == "cuda":
            # Torch's watchdog would end the process in its own way; rank 0 watches the ranks.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
            options = dist.ProcessGroupNCCL.Options()
            group = dist.ProcessGroupNCCL(store, shard.rank, shard.size, options)
        else:
            options = dist.ProcessGroupGloo._Options()
            options._timeout = timedelta(seconds=timeout)
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
            group = dist.ProcessGroupGloo(store, shard.rank, shard.size, options)
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnavailableError(f"the ranks of this worker did not meet: {reason}") from error
    return ProcessRanks(group, shard, device, timeout)
