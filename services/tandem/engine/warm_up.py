"""The iterations that an engine runs before it serves, so that no request pays for a first time.

On CUDA kernels are compiled when they are first used, each for some shapes of tiles: prompts of
several lengths, a decode step and a move of KV meet all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import IterationPlan, ScheduledChunk, Sequence
from tandem.engine.weights import Progress

if TYPE_CHECKING:
    from tandem.engine.engine import Engine

_PROMPT_LENGTHS = {"cpu": (31,), "cuda": (15, 31, 63, 127)}


def warm_up(engine: Engine, progress: Progress | None) -> None:
    """Run every kind of iteration once. No block may be in use yet."""
    capacity = min(engine.num_blocks * engine.storage.block_size, engine.spec.max_model_len)
    limits = {min(length, capacity - 1) for length in _PROMPT_LENGTHS[engine.device.type]}
    lengths = sorted(length for length in limits if length > 0)
    for number, length in enumerate(lengths):
        if progress is not None:
            progress("warming up", number / (len(lengths) + 1))
        _prompt_and_decode(engine, length)
    if engine.device.type == "cuda":
        _move_kv(engine)
        engine.capture_decode()
        torch.cuda.synchronize(engine.device)
    if progress is not None:
        progress("warming up", 1.0)


def _prompt_and_decode(engine: Engine, length: int) -> None:
    sampling = SamplingParams(max_tokens=2, temperature=1.0, top_p=0.9)
    seq = Sequence(Request("warm-up", (0,) * length, length, sampling), arrival=0)
    seq.block_table = list(range(-(-(length + 1) // engine.storage.block_size)))
    for start, count in ((0, length), (length, 1)):
        output = engine.run(IterationPlan((ScheduledChunk(seq, start, count),)))
        seq.token_ids.append(output.tokens[seq].token_id)


def _move_kv(engine: Engine) -> None:
    """What a transfer does, onto the same slots."""
    storage = engine.storage
    slots = storage.slots([0], 0, storage.block_size)
    storage.unpack(0, 1, slots, storage.pack(0, 1, slots))
