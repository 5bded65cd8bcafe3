"""What the device knows of the sequences that compute, kept from one iteration to the next.

Each has a slot: a row of its block table and a column of its sampling parameters. An iteration
names its slots, and what is new or has grown is written: so a sequence that joins or leaves costs
what it brings, whatever the size of the batch. A cache: whatever is dropped is written again.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from tandem.core.sequence import Sequence
from tandem.engine.block_tables import BlockTables
from tandem.engine.sampling_batch import SamplingBatch, SamplingColumns
from tandem.engine.slots import NO_SLOTS, Integers, Slots
from tandem_kernels import upload


class BatchState:
    """Used by one thread. Tensors that it returns are copies: later calls do not change them."""

    def __init__(self, eos_token_ids: tuple[int, ...], device: torch.device) -> None:
        self._device = device
        self._slots = Slots()
        self._num_slots = len(self._slots)
        self._tables = BlockTables(self._num_slots, device)
        self._sampling = SamplingBatch(eos_token_ids, self._num_slots, device)
        self._index = (NO_SLOTS, upload(NO_SLOTS, device))

    def enter(self, sequences: Rows[Sequence]) -> Integers:
        """Return the slot of each sequence, int64 [sequences]; those that are new get one.

        A sequence keeps its slot while it computes in every iteration and its blocks stay.
        """
        slots, new = self._slots.of([seq.block_table for seq in sequences])
        if new and len(self._slots) > self._num_slots:
            self._num_slots = len(self._slots)
            self._tables.extend(self._num_slots)
            self._sampling.extend(self._num_slots)
        for place in new:
            self._tables.clear(slots[place])
            self._sampling.write(slots[place], sequences[place].request.sampling)
        return slots

    def block_tables(self, sequences: Rows[Sequence], slots: Integers, needed: Integers) -> Tensor:
        """Return the first blocks of each sequence, as `BlockTables.stack` does."""
        if slots is not self._index[0]:
            self._index = (slots, upload(slots, self._device))
        return self._tables.stack(sequences, slots, self._index[1], needed)

    def columns(
        self, sequences: Rows[Sequence], slots: Integers, positions: Integers
    ) -> SamplingColumns:
        """Return what draws for these sequences depend on, as `SamplingBatch.columns` does."""
        return self._sampling.columns(sequences, slots, positions)

    def asking_prompt_logprobs(self, slots: Integers) -> list[int]:
        """Return the places of the sequences that ask for log-probabilities of their prompt."""
        return self._sampling.asking_prompt_logprobs(slots)
