"""Draws the next token of many sequences at once.

The order of the steps is vLLM's: logit bias, min_tokens, penalties, temperature, then the
truncations in `transformers`' order (top-k, top-p, min-p). Log-probabilities are those of the raw
logits.

A drawn token is a function of the logits, the sequence's own parameters and (seed, position), where
position is the index that the token gets in its sequence; never of the rest of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from tandem.core.request import SampledToken
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import Sequence
from tandem.engine.logprobs import position_logprobs
from tandem.engine.token_counts import TokenCountsCache
from tandem_kernels import REFERENCE_CHOICE, Choice, apply_penalties

_MIN_TEMPERATURE = 1e-6
"""Below it a draw equals the greedy choice; dividing by less would overflow."""


class Sampler:
    """Stateless but for the token counts that penalties need, which are a cache."""

    def __init__(self, eos_token_ids: tuple[int, ...], choice: Choice = REFERENCE_CHOICE) -> None:
        self._eos_token_ids = eos_token_ids
        self._choice = choice
        self._token_counts = TokenCountsCache()

    def sample(self, logits: Tensor, sequences: Rows[Sequence]) -> list[SampledToken]:
        """Draw one token per row. logits: float32 [rows, vocab], left unchanged."""
        params = [seq.request.sampling for seq in sequences]
        adjusted = self._adjust(logits, sequences, params)
        random_rows = [row for row, sampling in enumerate(params) if not sampling.greedy]
        if len(random_rows) == len(params):
            token_ids = self._draw(adjusted, sequences)
        else:
            token_ids = self._choice.argmax(adjusted)
            if random_rows:
                rows = torch.tensor(random_rows, device=logits.device)
                token_ids[rows] = self._draw(
                    adjusted[rows], [sequences[row] for row in random_rows]
                )
        return _with_logprobs(logits, token_ids.tolist(), params)

    def _draw(self, logits: Tensor, sequences: Rows[Sequence]) -> Tensor:
        """Return int64 [rows]: argmax of truncated logits / temperature + noise."""
        params = [seq.request.sampling for seq in sequences]
        device = logits.device
        scales = (max(sampling.temperature, _MIN_TEMPERATURE) for sampling in params)
        temperatures = _column(scales, torch.float32, device)
        seeds = _column((_as_int64(sampling.seed) for sampling in params), torch.int64, device)
        positions = _column((seq.num_tokens for seq in sequences), torch.int64, device)
        if not any(map(_truncates, params)):
            return self._choice.draw(logits, temperatures, seeds, positions)
        return self._choice.draw(
            logits,
            temperatures,
            seeds,
            positions,
            _column((sampling.top_k for sampling in params), torch.int64, device),
            _column((sampling.top_p for sampling in params), torch.float64, device),
            _column((sampling.min_p for sampling in params), torch.float32, device),
        )

    def _adjust(
        self, logits: Tensor, sequences: Rows[Sequence], params: Rows[SamplingParams]
    ) -> Tensor:
        """Apply bias, min_tokens and penalties to a copy; the logits themselves if there are
        none."""
        edits = self._edits(sequences)
        penalised = [row for row, sampling in enumerate(params) if _has_penalty(sampling)]
        if not edits and not penalised:
            return logits
        device = logits.device
        logits = logits.clone()
        if edits:
            rows, token_ids, amounts = zip(*edits, strict=True)
            index = (torch.tensor(rows, device=device), torch.tensor(token_ids, device=device))
            logits.index_put_(
                index, torch.tensor(amounts, dtype=torch.float32, device=device), accumulate=True
            )
        if penalised:
            self._penalise(logits, penalised, sequences, params)
        return logits

    def _edits(self, sequences: Rows[Sequence]) -> list[tuple[int, int, float]]:
        """Return (row, token id, what is added): biases, and -inf for tokens that may not end it
        yet.

        While a sequence is shorter than min_tokens, every id that could stop it is forbidden: the
        model's end-of-sequence ids, with ignore_eos too, and its own stop_token_ids.
        """
        edits: list[tuple[int, int, float]] = []
        for row, seq in enumerate(sequences):
            sampling = seq.request.sampling
            edits.extend((row, token_id, bias) for token_id, bias in sampling.logit_bias.items())
            if seq.num_output_tokens < sampling.min_tokens:
                forbidden = {*self._eos_token_ids, *sampling.stop_token_ids}
                edits.extend((row, token_id, float("-inf")) for token_id in forbidden)
        return edits

    def _penalise(
        self,
        logits: Tensor,
        rows: Rows[int],
        sequences: Rows[Sequence],
        params: Rows[SamplingParams],
    ) -> None:
        device = logits.device
        token_ids, output_counts = self._token_counts.batch([sequences[i] for i in rows], device)
        factors = torch.tensor(
            [
                (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
                for p in (params[row] for row in rows)
            ],
            dtype=torch.float32,
            device=device,
        )
        index = torch.tensor(rows, device=device)
        selected = logits[index]
        apply_penalties(selected, token_ids, output_counts, *factors.unbind(1))
        logits[index] = selected


def _column(values: Iterable[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(list(values), dtype=dtype, device=device)


def _with_logprobs(
    logits: Tensor, token_ids: Rows[int], params: Rows[SamplingParams]
) -> list[SampledToken]:
    asking = [row for row, sampling in enumerate(params) if sampling.logprobs is not None]
    tokens = [SampledToken(token_id, None) for token_id in token_ids]
    if asking:
        selected = (
            logits
            if len(asking) == len(params)
            else logits[torch.tensor(asking, device=logits.device)]
        )
        chosen = [token_ids[row] for row in asking]
        counts = [params[row].logprobs or 0 for row in asking]
        for row, position in zip(asking, position_logprobs(selected, chosen, counts), strict=True):
            tokens[row] = SampledToken(token_ids[row], position)
    return tokens


def _has_penalty(sampling: SamplingParams) -> bool:
    return (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )


def _truncates(sampling: SamplingParams) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def _as_int64(seed: int) -> int:
    """The two's complement of an unsigned 64-bit seed."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
