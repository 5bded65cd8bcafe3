"""Two endpoints in one process, joined by control streams that a test can listen to or disturb."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from transfer_endpoint import WAIT_SECONDS, Endpoint

from tandem.transfer import PeerTransfer
from tandem.v1 import worker_pb2

Filter = Callable[[worker_pb2.LinkMessage], bool]


class ControlStream:
    """One direction of a control stream: delivers in order, in a thread of its own, like gRPC's."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[bytes] = deque()
        self._ended = False
        self.deliver: Callable[[worker_pb2.LinkMessage], None] = lambda message: None
        self.passes: Filter = lambda message: True
        """A test's hook: False loses the message."""
        self.seen: list[worker_pb2.LinkMessage] = []
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._thread.start()

    def send(self, message: worker_pb2.LinkMessage) -> None:
        with self._changed:
            if self._ended:
                raise ConnectionError("the control stream has ended")
            self._queue.append(message.SerializeToString())
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join(WAIT_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or bool(self._queue))
                if self._ended:
                    return
                message = worker_pb2.LinkMessage.FromString(self._queue.popleft())
            self.seen.append(message)
            if self.passes(message):
                self.deliver(message)


class Pair:
    """Two connected peers. `near` and `far` are their views of each other."""

    def __init__(self, near_end: Endpoint, far_end: Endpoint) -> None:
        self.near_end, self.far_end = near_end, far_end
        self.to_far, self.to_near = ControlStream(), ControlStream()
        self.near: PeerTransfer = near_end.connect(far_end.name, self.to_far.send)
        self.far: PeerTransfer = far_end.connect(near_end.name, self.to_near.send)
        self.to_far.deliver, self.to_near.deliver = self.far.handle, self.near.handle

    def close(self) -> None:
        self.near.close()
        self.far.close()
        self.to_far.end()
        self.to_near.end()
        assert self.near.join(WAIT_SECONDS)
        assert self.far.join(WAIT_SECONDS)


Connect = Callable[[Endpoint, Endpoint], Pair]
