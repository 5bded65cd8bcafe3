"""An iteration that was handed to the device and may not have ended, and where it runs.

On CUDA the device has a queue of its own, the stream: handing over is queueing kernels. On CPUs a
compute thread stands for the stream; the kernels leave the interpreter to others while they run.
Either way iterations run one after the other in the order in which they were launched.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tandem.core.request import PositionLogprobs, SampledToken
from tandem.core.sequence import Sequence
from tandem.engine.slots import NO_SLOTS, Integers

Task = Callable[[], None]


@dataclass(frozen=True)
class IterationOutput:
    """What came out of one iteration."""

    tokens: dict[Sequence, SampledToken] = field(default_factory=dict)
    """The next token of every sequence whose chunk ended with its last token."""
    prompt_logprobs: dict[Sequence, list[PositionLogprobs]] = field(default_factory=dict)
    """For a chunk [start, end): prompt positions start + 1 to end, where they are asked for."""


class Launched:
    """One iteration from launch to `result`."""

    def __init__(self, drawn: Rows[Sequence] = (), slots: Integers = NO_SLOTS) -> None:
        self.drawn = drawn
        """The sequences that it draws a token for, one per row of `token_ids`."""
        self.slots = slots
        """int64 [drawn]: their slots in the batch state."""
        self.token_ids: Tensor | None = None
        """int64 [drawn], on the device: what the next iteration computes. Set when it runs."""
        self._ended = threading.Event()
        self._output: Callable[[], IterationOutput] | None = None
        self._error: Exception | None = None

    def run(self, compute: Callable[[], Callable[[], IterationOutput]]) -> None:
        """Compute; what `compute` returns waits for the device and brings the output here."""
        try:
            with torch.inference_mode():
                self._output = compute()
        except Exception as error:
            self._error = error
        self._ended.set()

    def result(self) -> IterationOutput:
        """Wait for its end and return what came out; raises what the forward pass raised."""
        self._ended.wait()
        if self._output is None:
            raise self._error or RuntimeError("the iteration has no output")
        return self._output()


def run_here(task: Task) -> None:
    """Run at once: on CUDA this queues kernels, on CPUs it computes before it returns."""
    task()


class ComputeThread:
    """Runs tasks one after the other in a thread of its own, which ends with the process."""

    def __init__(self, name: str, core: int | None = None) -> None:
        """`core`: the one that the thread stays on; None: any."""
        self._core = core
        self._tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def __call__(self, task: Task) -> None:
        self._tasks.put(task)

    def _run(self) -> None:
        if self._core is not None:
            os.sched_setaffinity(0, {self._core})
        while True:
            self._tasks.get()()


class HostCopy:
    """Tensors on their way to the host; on CUDA, queued behind what makes them."""

    def __init__(self, tensors: Rows[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        if not any(tensor.is_cuda for tensor in tensors):
            self._tensors = list(tensors)
            return
        self._tensors = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        for here, there in zip(self._tensors, tensors, strict=True):
            here.copy_(there, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> list[Tensor]:
        """Return the tensors on the host once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
