"""Draws the next token of many sequences at once.

The order of the steps is vLLM's: logit bias, min_tokens, penalties, temperature, then the
truncations in `transformers`' order (top-k, top-p, min-p). Log-probabilities are those of the raw
logits.

A drawn token is a function of the logits, the sequence's own parameters and (seed, position), where
position is the index that the token gets in its sequence; never of the rest of the batch.

Three steps, so that an iteration can be prepared while the one before computes:
`BatchState.columns` puts on the device what depends on the sequences, `Sampler.draw` works on the
device alone, `Drawing.read` brings tokens and log-probabilities to the host.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

from torch import Tensor

from tandem.core.request import SampledToken
from tandem.engine.launched import HostCopy
from tandem.engine.logprobs import read_logprobs
from tandem.engine.sampling_batch import SamplingColumns
from tandem_kernels import (
    REFERENCE_CHOICE,
    Choice,
    apply_penalties,
    top_logprobs,
)


class Drawing:
    """Tokens that were drawn, on their way to the host."""

    def __init__(self, token_ids: Tensor, top: Rows[Tensor], columns: SamplingColumns) -> None:
        self.token_ids = token_ids
        """int64 [rows], on the device."""
        self._copy = HostCopy([token_ids, *top])
        self._columns = columns

    def read(self) -> list[SampledToken]:
        """Wait for the tokens of every row, with log-probabilities where they are asked for."""
        columns = self._columns
        ids, *top = self._copy.wait()
        token_ids = ids.tolist()
        tokens = [SampledToken(token_id, None) for token_id in token_ids]
        if columns.asking:
            chosen = [token_ids[row] for row in columns.asking]
            positions = read_logprobs(top, chosen, columns.num_logprobs)
            for row, position in zip(columns.asking, positions, strict=True):
                tokens[row] = SampledToken(token_ids[row], position)
        return tokens


class Sampler:
    """Keeps nothing: a draw depends on its arguments alone."""

    def __init__(self, choice: Choice = REFERENCE_CHOICE) -> None:
        self._choice = choice

    def draw(self, logits: Tensor, columns: SamplingColumns) -> Drawing:
        """Draw one token per row, on the device. logits: float32 [rows, vocab], left unchanged."""
        adjusted = _adjust(logits, columns)
        if columns.random_rows is None:  # all of them
            token_ids = self._draw(adjusted, columns)
        else:
            token_ids = self._choice.argmax(adjusted)
            if len(columns.random_rows):
                rows = columns.random_rows
                token_ids[rows] = self._draw(adjusted[rows], columns)
        return Drawing(token_ids, _top(logits, token_ids, columns), columns)

    def _draw(self, logits: Tensor, columns: SamplingColumns) -> Tensor:
        """Return int64 [rows]: argmax of truncated logits / temperature + noise."""
        arguments = (logits, columns.temperatures, columns.seeds, columns.positions)
        return self._choice.draw(*arguments, *(columns.truncation or ()))


def _adjust(logits: Tensor, columns: SamplingColumns) -> Tensor:
    """Apply bias, min_tokens and penalties to a copy; the logits themselves if there are none."""
    edits, penalties = columns.edits, columns.penalties
    if edits is None and penalties is None:
        return logits
    logits = logits.clone()
    if edits is not None:
        logits.index_put_((edits.rows, edits.token_ids), edits.amounts, accumulate=True)
    if penalties is not None:
        selected = logits[penalties.rows]
        apply_penalties(
            selected, penalties.token_ids, penalties.output_counts, *penalties.factors.unbind(1)
        )
        logits[penalties.rows] = selected
    return logits


def _top(logits: Tensor, token_ids: Tensor, columns: SamplingColumns) -> Rows[Tensor]:
    """The tensors of a `TopLogprobs` for the rows that ask for log-probabilities."""
    if not columns.asking:
        return ()
    if columns.asking_rows is not None:
        logits, token_ids = logits[columns.asking_rows], token_ids[columns.asking_rows]
    return top_logprobs(logits, token_ids, max(columns.num_logprobs))
