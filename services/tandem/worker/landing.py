"""How much of a sequence's KV has landed, piece by piece. Pure.

Keeps the invariant that `contiguous` tokens are complete in every layer: only those may be
attended to, published, or kept when the rest has to come from elsewhere.
"""

from __future__ import annotations


class LandingProgress:
    """Counts, per layer, the tokens from the start of the sequence whose KV is in place."""

    def __init__(self, num_layers: int, held_tokens: int) -> None:
        self._landed = [held_tokens] * num_layers

    @property
    def contiguous(self) -> int:
        """Tokens from the start that are complete in every layer."""
        return min(self._landed)

    def add(self, first_layer: int, num_layers: int, start: int, num_tokens: int) -> None:
        """Note KV of tokens [start, start + num_tokens) in a group of layers.

        A piece that was seen before changes nothing. Raises ValueError for a piece that would
        leave a gap: a link is an ordered stream, so that is a protocol error.
        """
        for layer in range(first_layer, first_layer + num_layers):
            if start > self._landed[layer]:
                raise ValueError(
                    f"piece starts at token {start}, layer {layer} has only {self._landed[layer]}"
                )
            self._landed[layer] = max(self._landed[layer], start + num_tokens)
