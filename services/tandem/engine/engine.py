"""One forward pass per iteration, from a plan to the tokens drawn.

Owns the weights and the KV tensors. Who runs in an iteration and which blocks a sequence holds come
with the plan; sequences are read, never changed. Used by one thread, the engine thread.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import structlog
import torch
from torch import Tensor

from tandem.core.config import CacheConfig, ModelConfig
from tandem.core.request import PositionLogprobs, SampledToken
from tandem.core.sequence import IterationPlan, ScheduledChunk, Sequence
from tandem.engine.kv_capacity import Neighbours
from tandem.engine.load import load_model
from tandem.engine.logprobs import position_logprobs
from tandem.engine.models.compiled import CompiledModel
from tandem.engine.models.decoder import Decoder
from tandem.engine.parallel.compiled import CompiledShard
from tandem.engine.parallel.group import ALONE
from tandem.engine.parallel.leader import Announcer, LeadingModel
from tandem.engine.sampler import Sampler
from tandem.engine.spec import ModelSpec, load_spec
from tandem.engine.warm_up import warm_up
from tandem.engine.weights import Progress, WeightSource
from tandem_kernels import REFERENCE, RaggedBatch, implementation, runs_compiled_decoder

if TYPE_CHECKING:
    from tandem.engine.decode_graphs import DecodeGraphs

log = structlog.get_logger(__name__)

_GROUPS_PER_ITERATION = 4
_LOGPROB_ROWS = 64
"""Prompt positions whose logits are held at once."""
DECODE_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Batch sizes that decode graphs are captured for; a batch is padded up to the next."""


class LayerGroup(NamedTuple):
    """Layers whose KV of this iteration's tokens has been written."""

    first_layer: int
    num_layers: int
    ready: torch.cuda.Event | None
    """Recorded after the last write; None where writes are done when they return (CPU)."""


OnLayers = Callable[[LayerGroup], None]


@dataclass(frozen=True)
class IterationOutput:
    """What came out of one iteration."""

    tokens: dict[Sequence, SampledToken] = field(default_factory=dict)
    """The next token of every sequence whose chunk ended with its last known token."""
    prompt_logprobs: dict[Sequence, list[PositionLogprobs]] = field(default_factory=dict)
    """For a chunk [start, end): prompt positions start + 1 to end, where they are asked for."""


class _Rows(NamedTuple):
    """Rows of the batch whose hidden state is wanted for one chunk."""

    chunk: ScheduledChunk
    prompt: range
    """Rows whose next token is in the prompt and its log-probability is asked for."""
    samples: bool


class Engine:
    """A loaded model with its KV storage."""

    def __init__(
        self,
        model_dir: Path,
        model: ModelConfig,
        cache: CacheConfig,
        device: str = "cpu",
        layers_per_group: int = 0,
        progress: Progress | None = None,
        weights: WeightSource | None = None,
        neighbours: Neighbours | None = None,
        announcer: Announcer | None = None,
    ) -> None:
        """Load the weights, from the model directory's files if no other source is given.
        `layers_per_group` 0 makes four groups of layers; `neighbours` is who shares the memory that
        KV blocks are sized from. With an `announcer` this is rank 0 of several, and holds its part
        of the weights and of the KV heads.

        Raises `ModelLoadError` for a model that cannot be served, `ConfigError` for settings that
        do not fit it.
        """
        self.device = torch.device(device)
        self.spec: ModelSpec = load_spec(model_dir, model, device)
        self.layer_groups = _layer_groups(self.spec.num_layers, layers_per_group)
        self._progress = progress
        loaded = load_model(
            *(model_dir, model, cache, self.spec, self.device, self.layer_groups),
            progress=progress,
            weights=weights,
            neighbours=neighbours,
            ranks=ALONE if announcer is None else announcer.ranks,
        )
        self._decoder, self.storage, self.kv_capacity, load_seconds = loaded
        self.num_blocks = self.kv_capacity.num_blocks
        self._model: Decoder | CompiledModel | CompiledShard | LeadingModel = self._decoder
        if announcer is not None:
            self._model = LeadingModel(self._decoder, announcer, self.spec.vocab_size)
        self._sampler = Sampler(self.spec.eos_token_ids, self._decoder.choice)
        self._graphs: DecodeGraphs | None = None
        log.info(
            "model loaded",
            model=self.spec.name,
            architecture=self.spec.architecture,
            dtype=self.spec.dtype,
            device=str(self.device),
            kernels=self.kernels,
            load_seconds=round(load_seconds, 2),
            kv_cache=str(self.kv_capacity),
        )

    @property
    def kernels(self) -> str:
        """The implementation that forward passes run on, for people to read."""
        if runs_compiled_decoder(self.device) and isinstance(self._decoder, Decoder):
            return REFERENCE.name
        return implementation(self.device)

    def warm_up(self) -> None:
        """Run prompts and decode steps through everything once, and on CUDA capture the graphs of
        decode iterations. No block may be in use yet."""
        warm_up(self, self._progress)

    @torch.inference_mode()
    def capture_decode(self, sizes: Rows[int] = DECODE_SIZES) -> None:
        """Replay decode iterations from CUDA graphs from now on; launch them one kernel after the
        other, as before, where that cannot be. Without CUDA nothing is captured."""
        decoder = self._decoder
        if not isinstance(decoder, Decoder) or not self.kernels.startswith("Triton"):
            return
        if isinstance(self._model, LeadingModel):
            log.info("decode iterations run without CUDA graphs: the worker has several ranks")
            return
        from tandem.engine.decode_graphs import DecodeGraphs  # needs the triton package

        try:
            self._graphs = DecodeGraphs(decoder, self.storage, self.spec.max_model_len, sizes)
        except RuntimeError as error:
            reason = str(error).splitlines()[:1]
            log.warning("decode iterations run without CUDA graphs", reason=reason)

    @property
    def replays_decode(self) -> bool:
        """Whether decode iterations come from captured graphs."""
        return self._graphs is not None

    @torch.inference_mode()
    def decode_replay(self, chunks: Rows[ScheduledChunk]) -> Callable[[], Tensor]:
        """The forward pass of one captured decode iteration, to be timed by itself."""
        if self._graphs is None:
            raise ValueError("decode iterations are not captured")
        return self._graphs.prepare(chunks)

    @torch.inference_mode()
    def run(self, plan: IterationPlan, on_layers: OnLayers | None = None) -> IterationOutput:
        """Compute the plan's chunks in one forward pass.

        Every chunk's block table must cover its end. `on_layers` is called inside the pass as soon
        as the KV of a group of layers is written; on CUDA, queued to be written.
        """
        if not plan.chunks:
            return IterationOutput()
        if self._graphs is not None and on_layers is None and self._graphs.takes(plan.chunks):
            drawn = [chunk.sequence for chunk in plan.chunks]
            tokens = self._sampler.sample(self._graphs.run(plan.chunks), drawn)
            return IterationOutput(tokens=dict(zip(drawn, tokens, strict=True)))
        batch = RaggedBatch.build(
            [chunk.sequence.block_table for chunk in plan.chunks],
            [chunk.start for chunk in plan.chunks],
            [chunk.length for chunk in plan.chunks],
            self.storage.block_size,
            self.device,
        )
        wanted = [
            _wanted_rows(chunk, row)
            for chunk, row in zip(plan.chunks, batch.query_starts, strict=False)
        ]
        token_ids = [
            token_id
            for chunk in plan.chunks
            for token_id in chunk.sequence.token_ids[chunk.start : chunk.end]
        ]
        hidden = self._model.forward(
            torch.tensor(token_ids, device=self.device),
            batch,
            self.storage,
            self._row_index(wanted, batch),
            None if on_layers is None else self._group_caller(on_layers),
        )
        return self._finish(hidden, wanted)

    def record_event(self) -> torch.cuda.Event | None:
        """Mark what has been queued on the device so far; None where nothing is queued (CPU)."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _row_index(self, wanted: list[_Rows], batch: RaggedBatch) -> Tensor | None:
        """The wanted rows, prompt rows first; None when they are simply all rows."""
        rows = [row for entry in wanted for row in entry.prompt]
        ends = zip(wanted, batch.query_starts[1:], strict=True)
        rows.extend(end - 1 for entry, end in ends if entry.samples)
        if rows == list(range(batch.num_tokens)):
            return None
        return torch.tensor(rows, dtype=torch.int64, device=self.device)

    def _group_caller(self, on_layers: OnLayers) -> Callable[[int], None]:
        """Turn "this layer is written" into one call per group of layers."""
        last_layers = {first + count - 1: (first, count) for first, count in self.layer_groups}

        def on_written(layer: int) -> None:
            if layer in last_layers:
                ready = self.record_event()
                with torch.inference_mode(False):  # what the caller makes, others may write to
                    on_layers(LayerGroup(*last_layers[layer], ready))

        return on_written

    def _finish(self, hidden: Tensor, wanted: list[_Rows]) -> IterationOutput:
        """Turn hidden states, in the order of `_row_index`, into tokens and log-probabilities."""
        output = IterationOutput()
        row = 0
        for entry in wanted:
            if entry.prompt:
                states = hidden[row : row + len(entry.prompt)]
                output.prompt_logprobs[entry.chunk.sequence] = self._prompt_logprobs(
                    states, entry.chunk
                )
                row += len(entry.prompt)
        sampling = [entry.chunk.sequence for entry in wanted if entry.samples]
        if sampling:
            tokens = self._sampler.sample(self._model.logits(hidden[row:]), sampling)
            output.tokens.update(zip(sampling, tokens, strict=True))
        return output

    def _prompt_logprobs(self, hidden: Tensor, chunk: ScheduledChunk) -> list[PositionLogprobs]:
        seq = chunk.sequence
        count = seq.request.sampling.prompt_logprobs or 0
        result: list[PositionLogprobs] = []
        for states in torch.split(hidden, _LOGPROB_ROWS):
            start = chunk.start + 1 + len(result)
            chosen = seq.token_ids[start : start + len(states)]
            logits = self._model.logits(states)
            result.extend(position_logprobs(logits, chosen, [count] * len(chosen)))
        return result


def _layer_groups(num_layers: int, layers_per_group: int) -> tuple[tuple[int, int], ...]:
    """Return (first layer, number of layers) of each group; 0 per group makes four groups."""
    size = layers_per_group or -(-num_layers // _GROUPS_PER_ITERATION)
    return tuple((first, min(size, num_layers - first)) for first in range(0, num_layers, size))


def _wanted_rows(chunk: ScheduledChunk, first_row: int) -> _Rows:
    request = chunk.sequence.request
    count = 0
    if request.sampling.prompt_logprobs is not None:
        count = max(0, min(chunk.end, request.prompt_len - 1) - chunk.start)
    return _Rows(chunk, range(first_row, first_row + count), chunk.samples)
