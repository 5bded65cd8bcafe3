"""The weights of one rank, out of a source that has all of them.

Only the rank's part is read. What is filled up (the last rows of the vocabulary) is zero, and so
are the biases that another rank adds.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tandem.engine.models.config import DecoderConfig
from tandem.engine.parallel.shard import Shard
from tandem.engine.weights import Part, WeightSource


class ShardedWeights:
    """A `WeightSource` of one rank's tensors."""

    def __init__(self, source: WeightSource, shard: Shard, whole: DecoderConfig) -> None:
        self._source = source
        self._shard = shard
        self._whole = whole

    def read_into(self, name: str, out: Tensor, part: Part | None = None) -> None:
        """Copy this rank's part of a tensor into `out`."""
        if part is not None:
            raise ValueError(f"{name}: a part of a part was asked for")
        part = self._shard.part(name, self._whole)
        if part is None:
            self._source.read_into(name, out)
        else:
            self._source.read_into(name, out.narrow(part.dimension, 0, part.length), part)
            out.narrow(part.dimension, part.length, out.shape[part.dimension] - part.length).zero_()
        if not self._shard.adds_bias(name):
            out.zero_()

    def check_all_read(self, ignored: Sequence[str] = ()) -> None:
        """Raise `ModelLoadError` naming tensors that nothing asked for."""
        self._source.check_all_read(ignored)
