"""How the layers of a model are grouped for sending."""

from __future__ import annotations

from collections.abc import Iterator

_DEFAULT_GROUPS = 4


def layer_groups(num_layers: int, layers_per_group: int) -> Iterator[tuple[int, int]]:
    """Yield (first_layer, num_layers) of each group; 0 per group means four groups in all."""
    size = layers_per_group or -(-num_layers // _DEFAULT_GROUPS)
    for first in range(0, num_layers, size):
        yield first, min(size, num_layers - first)
