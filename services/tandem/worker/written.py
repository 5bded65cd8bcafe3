"""How far a rank's forward passes have come, so that no piece of KV is read before it is written.

Rank 0 may ask for a piece while this rank is still in the layer before; the piece waits here, and
whatever was asked for after it waits behind it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

Ready = torch.cuda.Event | None


class Point(NamedTuple):
    """Once a layer is written in a forward pass; these are numbered from 1."""

    iteration: int
    layer: int


class WrittenLayers:
    """Lets actions happen in the order in which they were asked for, none before its point."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reached = Point(0, 0)
        self._ready: Ready = None
        self._waiting: deque[tuple[Point, Callable[[Ready], None]]] = deque()

    def note(self, iteration: int, layer: int, ready: Ready) -> None:
        """A layer, and all before it, is written once `ready` has happened on the device."""
        with self._lock:
            self._reached, self._ready = Point(iteration, layer), ready
            self._run_due()

    def when(self, point: Point, action: Callable[[Ready], None]) -> None:
        """Call `action` with what is to be waited for on the device: now, or from `note`."""
        with self._lock:
            self._waiting.append((point, action))
            self._run_due()

    def _run_due(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._reached:
            _, action = self._waiting.popleft()
            action(self._ready)
