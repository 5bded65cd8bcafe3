"""Models for the sections: random ones of a given shape whose weights are made on the device.

No checkpoint is written but its header, so an 8B model is ready in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence as Rows
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tandem.core.config import CacheConfig, ModelConfig
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import IterationPlan, ScheduledChunk, Sequence
from tandem.engine import Engine
from tandem.engine.weights import Part

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
TINY: dict[str, Any] = {
    **LLAMA_8B,
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}


class RandomWeights:
    """A `WeightSource` that fills every tensor with noise of the usual scale, always the same."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)

    def read_into(self, name: str, out: Tensor, part: Part | None = None) -> None:
        mean = 1.0 if "norm" in name else 0.0
        out.normal_(mean, 0.02, generator=self._generator)

    def check_all_read(self, ignored: Rows[str] = ()) -> None:
        """Every name that is asked for is there."""


def random_engine(
    directory: Path, shape: dict[str, Any], device: torch.device, num_blocks: int
) -> Engine:
    """An engine with random weights and random KV: zeros would be faster than real data."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(shape))
    save_file({"none": torch.zeros(1)}, directory / "model.safetensors")
    model = ModelConfig(path=str(directory), dtype=shape["torch_dtype"])
    cache = CacheConfig(block_size=16, num_blocks=num_blocks)
    engine = Engine(directory, model, cache, str(device), weights=RandomWeights(device))
    engine.storage.kv.normal_()
    return engine


def sequence(engine: Engine, name: str, tokens: int, first_block: int) -> Sequence:
    """A sequence of `tokens` random prompt tokens with blocks for eighty more."""
    ids = torch.randint(0, engine.spec.vocab_size, (tokens,)).tolist()
    params = SamplingParams(max_tokens=10_000, temperature=0.0, ignore_eos=True)
    seq = Sequence(Request(name, tuple(ids), tokens, params), arrival=0)
    seq.block_table = list(range(first_block, first_block + blocks_of(engine, tokens)))
    return seq


def blocks_of(engine: Engine, tokens: int) -> int:
    """Blocks that `sequence` takes."""
    return -(-(tokens + 80) // engine.storage.block_size)


def decode_plan(sequences: Rows[Sequence]) -> IterationPlan:
    """One token of each: the last of its prompt."""
    return IterationPlan(tuple(ScheduledChunk(seq, seq.num_tokens - 1, 1) for seq in sequences))


def prefill_plans(seq: Sequence, chunk: int) -> list[IterationPlan]:
    """The whole prompt in chunks."""
    return [
        IterationPlan((ScheduledChunk(seq, start, min(chunk, seq.num_tokens - start)),))
        for start in range(0, seq.num_tokens, chunk)
    ]


def layer_parameters(shape: dict[str, Any]) -> int:
    """Weights of the matrices in all layers."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    ratio = shape["num_key_value_heads"] / shape["num_attention_heads"]
    attention = hidden * hidden * (2 + 2 * ratio)
    return int(shape["num_hidden_layers"] * (attention + 3 * hidden * inner))


def head_parameters(shape: dict[str, Any]) -> int:
    """Weights of the output projection."""
    return int(shape["vocab_size"] * shape["hidden_size"])


def prefill_flops(shape: dict[str, Any], tokens: int) -> float:
    """Multiplications and additions of a prompt; logits of its last token only."""
    causal = 2 * tokens * tokens * shape["hidden_size"] * shape["num_hidden_layers"]
    return 2.0 * tokens * layer_parameters(shape) + causal + 2.0 * head_parameters(shape)
