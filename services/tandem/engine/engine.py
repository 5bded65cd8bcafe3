"""One forward pass per iteration, from a plan to the tokens drawn.

Owns the weights and the KV tensors. Who runs in an iteration and which blocks a sequence holds come
with the plan; sequences are read, never changed. Used by one thread, the engine thread.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import structlog
import torch
from torch import Tensor

from tandem.core.config import CacheConfig, ModelConfig
from tandem.core.request import PositionLogprobs
from tandem.core.sequence import IterationPlan, ScheduledChunk, Sequence
from tandem.engine.batch_state import BatchState
from tandem.engine.inputs import InputBuilder, IterationInputs, PromptRows
from tandem.engine.kv_capacity import Neighbours
from tandem.engine.launched import ComputeThread, IterationOutput, Launched, Task, run_here
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
from tandem_kernels import REFERENCE, implementation, runs_compiled_decoder

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
ReadOutput = Callable[[], IterationOutput]


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
        self._sampler = Sampler(self._decoder.choice)
        state = BatchState(self.spec.eos_token_ids, self.device)
        self._inputs = InputBuilder(state, cache.block_size, self.device)
        self._graphs: DecodeGraphs | None = None
        self._last: Launched | None = None
        self._execute: Callable[[Task], None] = run_here
        self._log_loaded(load_seconds)

    def _log_loaded(self, seconds: float) -> None:
        log.info(
            "model loaded",
            model=self.spec.name,
            architecture=self.spec.architecture,
            dtype=self.spec.dtype,
            device=str(self.device),
            kernels=self.kernels,
            load_seconds=round(seconds, 2),
            kv_cache=str(self.kv_capacity),
        )

    @property
    def kernels(self) -> str:
        """The implementation that forward passes run on, for people to read."""
        if runs_compiled_decoder(self.device) and isinstance(self._decoder, Decoder):
            return REFERENCE.name
        return implementation(self.device)

    def pin(self, cores: Rows[int]) -> None:
        """Keep the threads that compute on cores, one on each; the first is for the caller of
        `run`, who pins itself."""
        if isinstance(self._decoder, CompiledModel):
            self._decoder.pin(cores)

    def compute_ahead(self, core: int | None = None) -> None:
        """Let `launch` return before the iteration has ended, from a thread that stays on `core`.
        On CUDA it returns so anyway."""
        if self.device.type != "cuda":
            self._execute = ComputeThread("compute", core)

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
        inputs = self._inputs.build(chunks, None)
        return self._graphs.prepare(inputs.token_ids_after(None), inputs.batch)

    @torch.inference_mode()
    def run(self, plan: IterationPlan, on_layers: OnLayers | None = None) -> IterationOutput:
        """Compute the plan's chunks in one forward pass.

        Every chunk's block table must cover its end. `on_layers` is called inside the pass as soon
        as the KV of a group of layers is written; on CUDA, queued to be written.
        """
        return self.launch(plan, on_layers).result()

    @torch.inference_mode()
    def launch(self, plan: IterationPlan, on_layers: OnLayers | None = None) -> Launched:
        """Start on the plan's chunks and return without waiting for them, if the engine computes
        ahead or runs on CUDA. Iterations compute in the order of their launch.

        A chunk's token may be one that the iteration launched before it draws. Until `result` of an
        iteration has returned, the blocks that it writes must not be given to anybody.
        """
        inputs = self._inputs.build(plan.chunks, self._last) if plan.chunks else None
        launched = Launched(inputs.drawn, inputs.slots) if inputs is not None else Launched()
        previous, self._last = self._last, launched
        self._execute(
            lambda: launched.run(lambda: self._compute(inputs, launched, previous, on_layers))
        )
        return launched

    def _compute(
        self,
        inputs: IterationInputs | None,
        launched: Launched,
        previous: Launched | None,
        on_layers: OnLayers | None,
    ) -> ReadOutput:
        """Queue a forward pass and its draws on the device; what is returned waits for them."""
        if inputs is None:
            return IterationOutput
        token_ids = inputs.token_ids_after(previous)
        graphs = self._graphs
        hidden: Tensor | None = None
        if graphs is not None and on_layers is None and graphs.takes(inputs):
            logits = graphs.run(token_ids, inputs.batch)
        else:
            group_caller = None if on_layers is None else self._group_caller(on_layers)
            hidden = self._model.forward(
                token_ids, inputs.batch, self.storage, inputs.wanted_rows, group_caller
            )
        prompt_logprobs = self._prompt_logprobs(hidden, inputs.prompt_rows)
        if inputs.columns is None:
            return lambda: IterationOutput(prompt_logprobs=prompt_logprobs)
        if hidden is not None:
            logits = self._model.logits(hidden[-len(inputs.drawn) :])
        drawing = self._sampler.draw(logits, inputs.columns)
        launched.token_ids = drawing.token_ids
        return lambda: IterationOutput(
            dict(zip(inputs.drawn, drawing.read(), strict=True)), prompt_logprobs
        )

    def record_event(self) -> torch.cuda.Event | None:
        """Mark what has been queued on the device so far; None where nothing is queued (CPU)."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _group_caller(self, on_layers: OnLayers) -> Callable[[int], None]:
        """Turn "this layer is written" into one call per group of layers."""
        last_layers = {first + count - 1: (first, count) for first, count in self.layer_groups}

        def on_written(layer: int) -> None:
            if layer in last_layers:
                ready = self.record_event()
                with torch.inference_mode(False):  # what the caller makes, others may write to
                    on_layers(LayerGroup(*last_layers[layer], ready))

        return on_written

    def _prompt_logprobs(
        self, hidden: Tensor | None, wanted: Rows[PromptRows]
    ) -> dict[Sequence, list[PositionLogprobs]]:
        """Log-probabilities of prompt tokens, from hidden states in the order of `wanted`."""
        result: dict[Sequence, list[PositionLogprobs]] = {}
        row = 0
        for chunk, rows in wanted:
            if hidden is None:
                raise ValueError("a captured decode iteration has no prompt rows")
            seq = chunk.sequence
            count = seq.request.sampling.prompt_logprobs or 0
            positions: list[PositionLogprobs] = []
            for states in torch.split(hidden[row : row + len(rows)], _LOGPROB_ROWS):
                start = chunk.start + 1 + len(positions)
                chosen = seq.token_ids[start : start + len(states)]
                logits = self._model.logits(states)
                positions.extend(position_logprobs(logits, chosen, [count] * len(chosen)))
            result[seq] = positions
            row += len(rows)
        return result


def _layer_groups(num_layers: int, layers_per_group: int) -> tuple[tuple[int, int], ...]:
    """Return (first layer, number of layers) of each group; 0 per group makes four groups."""
    size = layers_per_group or -(-num_layers // _GROUPS_PER_ITERATION)
    return tuple((first, min(size, num_layers - first)) for first in range(0, num_layers, size))
