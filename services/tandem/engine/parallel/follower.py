"""What a rank other than 0 runs: the forward passes that rank 0 announces, and nothing else.

It neither schedules nor samples; which blocks are whose is rank 0's knowledge.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tandem.engine.models.layers import OnWritten
from tandem.engine.parallel.leader import ShardModel
from tandem.kvcache.storage import KVStorage
from tandem_kernels import RaggedBatch

Numbers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


class Follower:
    """One rank's part of the model. Used by one thread."""

    def __init__(self, model: ShardModel, storage: KVStorage) -> None:
        self._model = model
        self.storage = storage
        self._hidden: Tensor | None = None

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Numbers,
        starts: Numbers,
        lengths: Numbers,
        block_tables: Numbers,
        wanted_rows: Numbers | None,
        on_written: OnWritten,
    ) -> None:
        """Compute the tokens' KV and keep the wanted rows' final hidden states.

        token_ids: [tokens]; starts, lengths: [sequences]; block_tables: [sequences, widest].
        """
        storage, device = self.storage, self.storage.device
        batch = RaggedBatch.build(
            block_tables.tolist(), starts.tolist(), lengths.tolist(), storage.block_size, device
        )
        wanted = None if wanted_rows is None else torch.tensor(wanted_rows, device=device)
        tokens = torch.tensor(token_ids, device=device)
        self._hidden = self._model.forward(tokens, batch, storage, wanted, on_written)

    @torch.inference_mode()
    def logits(self, first_row: int, num_rows: int) -> None:
        """Give rank 0 this rank's part of the logits of some rows of the last forward pass."""
        if self._hidden is None:
            raise ValueError("logits are wanted before the first forward pass")
        self._model.logits(self._hidden[first_row : first_row + num_rows])
