"""What an iteration reads, put on the device before it computes: the host's part of a launch.

Nothing here waits for the device. What the iteration before has still to draw is not known yet: it
is taken from that iteration's own output, on the device, when this one computes.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tandem.core.sequence import ScheduledChunk, Sequence
from tandem.engine.batch_state import BatchState
from tandem.engine.launched import Launched
from tandem.engine.sampling_batch import SamplingColumns
from tandem.engine.slots import NO_SLOTS, Integers
from tandem_kernels import RaggedBatch, upload

Flags = np.ndarray[tuple[int], np.dtype[np.bool_]]


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
    slots: Integers
    """int64 [drawn]: their slots in the batch state."""
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
    """Builds the inputs of one iteration after the other over the batch state."""

    def __init__(self, state: BatchState, block_size: int, device: torch.device) -> None:
        self._state = state
        self._block_size = block_size
        self._device = device

    def build(self, chunks: Rows[ScheduledChunk], previous: Launched | None) -> IterationInputs:
        """Lay out the chunks of one iteration. Every block table must cover its chunk's end.

        `previous` is the iteration launched before this one, whose draws may be awaited.
        """
        sequences, starts, lengths, samples, in_flight = zip(*chunks, strict=True)
        first, counts = np.array(starts, dtype=np.int64), np.array(lengths, dtype=np.int64)
        ends = first + counts
        slots = self._state.enter(sequences)
        tables = self._state.block_tables(sequences, slots, -(-ends // self._block_size))
        batch = RaggedBatch.over(tables, first, counts, self._block_size)
        known, awaited = self._token_ids(chunks, counts, slots, in_flight, previous)
        only_decodes = all(samples) and batch.num_tokens == len(chunks)
        prompt_rows: list[PromptRows] = []
        wanted: Tensor | None = None
        if only_decodes:
            drawn, positions = list(sequences), ends
        else:
            drawn, draws = list(compress(sequences, samples)), _flags(samples)
            prompt_rows = self._prompt_rows(chunks, slots, batch.query_starts)
            wanted = self._wanted(prompt_rows, np.cumsum(counts)[draws] - 1, batch.num_tokens)
            slots, positions = slots[draws], ends[draws]
        return IterationInputs(
            batch=batch,
            known_token_ids=known,
            awaited=awaited,
            drawn=drawn,
            slots=slots,
            columns=self._state.columns(drawn, slots, positions) if drawn else None,
            prompt_rows=prompt_rows,
            wanted_rows=wanted,
            only_decodes=only_decodes,
        )

    def _token_ids(
        self,
        chunks: Rows[ScheduledChunk],
        counts: Integers,
        slots: Integers,
        awaited: Rows[bool],
        previous: Launched | None,
    ) -> tuple[Tensor | None, Awaited | None]:
        """Return the token ids that are known and where the others come from."""
        if previous is not None and slots is previous.slots and all(awaited):
            return None, None
        known: list[int] = []
        in_flight = _flags(awaited)
        none_awaited = not any(awaited)
        places = range(len(chunks)) if none_awaited else np.flatnonzero(~in_flight).tolist()
        for place in places:
            seq, start, length, *_ = chunks[place]
            if length == 1:
                known.append(seq.token_ids[start])
            else:
                known.extend(seq.token_ids[start : start + length])
        if none_awaited:
            return upload(np.array(known, dtype=np.int64), self._device), None
        is_known = np.repeat(~in_flight, counts)
        token_ids = np.zeros(len(is_known), dtype=np.int64)
        token_ids[is_known] = known
        rows = (np.cumsum(counts) - 1)[in_flight]  # one token each
        sources = _places(slots[in_flight], previous.slots if previous is not None else NO_SLOTS)
        index = upload(np.stack((rows, sources)), self._device)
        return upload(token_ids, self._device), Awaited(index[0], index[1])

    def _prompt_rows(
        self, chunks: Rows[ScheduledChunk], slots: Integers, first_rows: Rows[int]
    ) -> list[PromptRows]:
        wanted = []
        for place in self._state.asking_prompt_logprobs(slots):
            chunk, first_row = chunks[place], first_rows[place]
            count = min(chunk.end, chunk.sequence.request.prompt_len - 1) - chunk.start
            if count > 0:
                wanted.append(PromptRows(chunk, range(first_row, first_row + count)))
        return wanted

    def _wanted(
        self, prompt_rows: Rows[PromptRows], drawn_rows: Integers, num_rows: int
    ) -> Tensor | None:
        """The wanted rows; None when they are simply all rows."""
        rows = np.concatenate([*(np.array(entry.rows) for entry in prompt_rows), drawn_rows])
        if np.array_equal(rows, np.arange(num_rows)):
            return None
        return upload(rows, self._device)


def _flags(values: Rows[bool]) -> Flags:
    return np.frombuffer(bytes(values), dtype=np.bool_)


def _places(slots: Integers, among: Integers) -> Integers:
    """Return where each of `slots` is in `among`. Raises `ValueError` if one is not."""
    place_of = np.full(max(slots.max(), among.max(initial=0)) + 1, -1)
    place_of[among] = np.arange(len(among))
    places = place_of[slots]
    if (places < 0).any():
        raise ValueError("a token is awaited that the iteration before does not draw")
    return places
