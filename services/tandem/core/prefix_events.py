"""What becomes of the blocks that a worker can find by prefix: news for routers. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

KEY_BYTES = 8
"""Of a block's hash: enough to tell millions of blocks apart; a wrong guess costs a cache miss."""


@dataclass(frozen=True, slots=True)
class PrefixEvents:
    """Changes since the message before, in both tiers. Keys are the first bytes of block hashes."""

    number: int
    """Consecutive on one stream."""
    reset: bool = False
    """Forget everything: what follows, here and in the next messages, is all that there is."""
    stored: tuple[bytes, ...] = ()
    evicted: tuple[bytes, ...] = ()
    host_stored: tuple[bytes, ...] = ()
    host_evicted: tuple[bytes, ...] = ()
    host_value: float = 0.0
    """Share of the time to compute a block that is saved by copying it back from host memory."""
    prompt_token_seconds: float = 0.0
    """What computing one takes the worker now, by its own measurements; 0: it does not know yet."""
