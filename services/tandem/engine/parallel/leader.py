"""What rank 0 runs in place of its part of the model: it tells the other ranks first.

The calls are those of `Decoder`, so that the engine need not know. Invariant: every call that makes
the ranks meet in their group is announced before it starts, in the order in which it runs.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from tandem.engine.models.layers import OnWritten
from tandem.engine.parallel.group import RankGroup
from tandem.kvcache.storage import KVStorage
from tandem_kernels import Choice, RaggedBatch


class ShardModel(Protocol):
    """One rank's part of a decoder: `Decoder` or `CompiledShard`."""

    def forward(
        self,
        token_ids: Tensor,
        batch: RaggedBatch,
        storage: KVStorage,
        wanted_rows: Tensor | None,
        on_written: OnWritten | None,
    ) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    @property
    def choice(self) -> Choice: ...


class Announcer(Protocol):
    """Tells the other ranks what rank 0 is about to run."""

    ranks: RankGroup

    def forward(self, token_ids: Tensor, batch: RaggedBatch, wanted_rows: Tensor | None) -> None:
        """A forward pass over this batch."""

    def logits(self, first_row: int, num_rows: int) -> None:
        """Logits of some rows of the last forward pass's result."""

    def lost(self, error: Exception) -> None:
        """What was announced failed here: the other ranks wait for it in vain."""


class LeadingModel:
    """Rank 0's part of a decoder, and the way to the other parts."""

    def __init__(self, model: ShardModel, announcer: Announcer, vocab_size: int) -> None:
        """vocab_size: without what fills it up to equal parts."""
        self._model = model
        self._announcer = announcer
        self._vocab_size = vocab_size
        self._hidden: Tensor | None = None

    def forward(
        self,
        token_ids: Tensor,
        batch: RaggedBatch,
        storage: KVStorage,
        wanted_rows: Tensor | None,
        on_written: OnWritten | None,
    ) -> Tensor:
        """As `Decoder.forward`."""
        self._announcer.forward(token_ids, batch, wanted_rows)
        try:
            self._hidden = self._model.forward(token_ids, batch, storage, wanted_rows, on_written)
        except Exception as error:
            self._announcer.lost(error)
            raise
        return self._hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 [rows, vocab_size]. `hidden`: rows of what `forward` last returned, one
        after the other; every rank takes its own copy of them."""
        self._announcer.logits(self._first_row(hidden), len(hidden))
        try:
            logits = self._model.logits(hidden)
        except Exception as error:
            self._announcer.lost(error)
            raise
        return logits[:, : self._vocab_size].contiguous()

    @property
    def choice(self) -> Choice:
        """What draws tokens from this model's logits."""
        return self._model.choice

    def _first_row(self, hidden: Tensor) -> int:
        whole = self._hidden
        if (
            whole is None
            or whole.untyped_storage().data_ptr() != hidden.untyped_storage().data_ptr()
        ):
            raise ValueError("logits are wanted of rows that the last forward pass did not return")
        return (hidden.storage_offset() - whole.storage_offset()) // whole.shape[1]
