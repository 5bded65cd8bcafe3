"""KV in flight: when a piece arrives, given what its two ends are busy with."""

from __future__ import annotations

from collections import defaultdict

from tandem.simulator.profile import LinkCost


class Links:
    """Each worker sends one piece at a time and receives one at a time, in order of asking."""

    def __init__(self, cost: LinkCost) -> None:
        self._cost = cost
        self._sender_free: dict[str, float] = defaultdict(float)
        self._receiver_free: dict[str, float] = defaultdict(float)
        self.busy_seconds: dict[str, float] = defaultdict(float)
        """Seconds that each sender's link was in use."""
        self.num_bytes = 0.0

    def send(self, sender: str, receiver: str, num_tokens: float, ready: float) -> float:
        """Send the KV of `num_tokens` tokens (a fraction: of some layers); return its arrival."""
        size = num_tokens * self._cost.kv_bytes_per_token
        began = max(ready, self._sender_free[sender], self._receiver_free[receiver])
        seconds = self._cost.latency + size / self._cost.bytes_per_second
        self._sender_free[sender] = self._receiver_free[receiver] = began + seconds
        self.busy_seconds[sender] += seconds
        self.num_bytes += size
        return began + seconds

    def send_chunk(
        self, sender: str, receiver: str, num_tokens: int, began: float, ended: float
    ) -> tuple[float, float]:
        """Send a chunk that is computed from `began` to `ended`, group of layers by group.

        Returns when its first piece was ready and when its last one arrives.
        """
        groups = self._cost.layer_groups
        first = began + (ended - began) / groups
        size = num_tokens * self._cost.kv_bytes_per_token
        piece = self._cost.latency + size / groups / self._cost.bytes_per_second
        free = max(first, self._sender_free[sender], self._receiver_free[receiver])
        # All pieces are equal and equally spaced: they wait for the link from the first on, or for
        # the last one to be computed.
        arrival = max(free + groups * piece, ended + piece)
        self._sender_free[sender] = self._receiver_free[receiver] = arrival
        self.busy_seconds[sender] += groups * piece
        self.num_bytes += size
        return first, arrival
