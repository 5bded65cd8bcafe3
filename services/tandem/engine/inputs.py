"""What an iteration reads, put on the device before it computes: the host's part of a launch.

Nothing here waits for the device. What the iteration before has still to draw is not known yet: it
is taken from that iteration's own output, on the device, when this one computes.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tandem.core.sequence import ScheduledChunk, Sequence
from tandem.engine.block_tables import BlockTables
from tandem.engine.launched import Launched
from tandem.engine.sampler import Sampler
from tandem.engine.sampling_batch import SamplingColumns
from tandem_kernels import RaggedBatch, upload


class PromptRows(NamedTuple):
    """Rows of the batch whose next token is in the prompt and its log-probability is asked for."""

    chunk: ScheduledChunk
    rows: range


class Awaited(NamedTuple):
    """Rows whose token the iteration before draws: `rows[i]` reads its row `sources[i]`."""

    rows: Tensor
    sources: Tensor


@dataclass(frozen=True, eq=False)
class IterationInputs:
    """One iteration as the device sees it. Tensors on the device."""

    batch: RaggedBatch
    known_token_ids: Tensor | None
    """int64 [tokens], 0 where a token is awaited; None: all are, from the same rows."""
    awaited: Awaited | None
    drawn: list[Sequence]
    """The sequences that a token is drawn for, in the order of their rows."""
    columns: SamplingColumns | None
    prompt_rows: list[PromptRows]
    wanted_rows: Tensor | None
    """int64: rows whose hidden state is wanted, those of `prompt_rows` first; None: all rows."""
    only_decodes: bool
    """Whether each chunk is a single token that is followed by a draw."""

    def token_ids_after(self, previous: Launched | None) -> Tensor:
        """Return int64 [tokens], once the iteration before is queued on the device."""
        known, awaited = self.known_token_ids, self.awaited
        if known is not None and awaited is None:
            return known
        drawn = previous.token_ids if previous is not None else None
        if drawn is None:
            raise RuntimeError("the iteration before, which draws this one's tokens, failed")
        if known is None or awaited is None:
            return drawn
        known[awaited.rows] = drawn[awaited.sources]
        return known


class InputBuilder:
    """Builds the inputs, reusing what the iteration before has put on the device."""

    def __init__(self, sampler: Sampler, block_size: int, device: torch.device) -> None:
        self._sampler = sampler
        self._block_size = block_size
        self._device = device
        self._tables = BlockTables(device)

    def build(self, chunks: Rows[ScheduledChunk], previous: Launched | None) -> IterationInputs:
        """Lay out the chunks of one iteration. Every block table must cover its chunk's end.

        `previous` is the iteration launched before this one, whose draws may be awaited.
        """
        sequences, starts, lengths, samples, in_flight = zip(*chunks, strict=True)
        first, counts = np.array(starts, dtype=np.int64), np.array(lengths, dtype=np.int64)
        ends = first + counts
        tables = [seq.block_table for seq in sequences]
        stacked = self._tables.stack(tables, -(-ends // self._block_size))
        batch = RaggedBatch.over(stacked, first, counts, self._block_size)
        only_decodes = all(samples) and batch.num_tokens == len(chunks)
        drawn = (
            list(sequences)
            if only_decodes
            else [seq for seq, draws in zip(sequences, samples, strict=True) if draws]
        )
        prompt_rows = [] if only_decodes else _prompt_rows(chunks, batch.query_starts)
        positions = ends if only_decodes else ends[np.array(samples)]
        known, awaited = self._token_ids(chunks, in_flight, previous)
        return IterationInputs(
            batch=batch,
            known_token_ids=known,
            awaited=awaited,
            drawn=drawn,
            columns=self._sampler.prepare(drawn, positions, self._device) if drawn else None,
            prompt_rows=prompt_rows,
            wanted_rows=None if only_decodes else self._wanted(prompt_rows, samples, batch),
            only_decodes=only_decodes,
        )

    def _token_ids(
        self, chunks: Rows[ScheduledChunk], in_flight: Rows[bool], previous: Launched | None
    ) -> tuple[Tensor | None, Awaited | None]:
        """Return the token ids that are known and where the others come from."""
        before = previous.drawn if previous is not None else ()
        if all(in_flight) and [chunk.sequence for chunk in chunks] == before:
            return None, None
        token_ids: list[int] = []
        rows: list[int] = []
        sources: list[int] = []
        row_of = {seq: row for row, seq in enumerate(before)} if any(in_flight) else {}
        for seq, start, length, _, awaited in chunks:
            if awaited:
                rows.append(len(token_ids))
                sources.append(row_of[seq])
                token_ids.append(0)
            elif length == 1:
                token_ids.append(seq.token_ids[start])
            else:
                token_ids.extend(seq.token_ids[start : start + length])
        known = upload(np.array(token_ids, dtype=np.int64), self._device)
        if not rows:
            return known, None
        index = upload(np.array((rows, sources), dtype=np.int64), self._device)
        return known, Awaited(index[0], index[1])

    def _wanted(
        self, prompt_rows: Rows[PromptRows], samples: Rows[bool], batch: RaggedBatch
    ) -> Tensor | None:
        """The wanted rows; None when they are simply all rows."""
        rows = [row for entry in prompt_rows for row in entry.rows]
        ends = zip(samples, batch.query_starts[1:], strict=True)
        rows.extend(end - 1 for draws, end in ends if draws)
        if rows == list(range(batch.num_tokens)):
            return None
        return upload(np.array(rows, dtype=np.int64), self._device)


def _prompt_rows(chunks: Rows[ScheduledChunk], first_rows: Rows[int]) -> list[PromptRows]:
    wanted = []
    for chunk, first_row in zip(chunks, first_rows, strict=False):
        request = chunk.sequence.request
        if request.sampling.prompt_logprobs is not None:
            count = min(chunk.end, request.prompt_len - 1) - chunk.start
            if count > 0:
                wanted.append(PromptRows(chunk, range(first_row, first_row + count)))
    return wanted
