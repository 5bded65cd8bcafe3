"""Makes the models that benchmarks run: the shapes of real ones, random weights.

One weighs as much as Qwen2.5-0.5B, so memory and arithmetic decide; one has 15 million parameters,
so overhead does. Weights do not matter to how fast a model runs. Made once, the same on every
machine, and kept in benchmarks/.cache (about 1 GB), or wherever TANDEM_BENCH_CACHE says; run this
file to make them without a benchmark. Other engines load them too.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CACHE = Path(os.environ.get("TANDEM_BENCH_CACHE") or Path(__file__).parent / ".cache").resolve()
QWEN_NAME, LLAMA_NAME = "qwen2.5-0.5b-shape-v2", "llama-15m-shape-v1"
FREE_BYTES_NEEDED = 2 * 2**30
SEED = 20
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

QWEN_SHAPE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "initializer_range": 0.02,
}

LLAMA_SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "initializer_range": 0.02,
}


def qwen_shaped_model(cache: Path = CACHE, shape: dict[str, Any] = QWEN_SHAPE) -> Path:
    """Return the directory of the model of half a billion parameters, making it if need be.

    Raises `OSError` when the disk has no room for it.
    """
    return _made_once(cache, QWEN_NAME, shape)


def llama_shaped_model(cache: Path = CACHE, shape: dict[str, Any] = LLAMA_SHAPE) -> Path:
    """Return the directory of the model of 15 million parameters; as `qwen_shaped_model`."""
    return _made_once(cache, LLAMA_NAME, shape)


def _made_once(cache: Path, name: str, shape: dict[str, Any]) -> Path:
    directory = cache / name
    if directory.is_dir():
        return directory
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if free < FREE_BYTES_NEEDED:
        raise OSError(f"{cache}: {free / 2**30:.1f} GiB free, the model needs 2 while it is made")
    made = Path(mkdtemp(prefix="making-", dir=cache))
    try:
        _write(made, shape)
        made.rename(directory)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return directory


def _write(directory: Path, shape: dict[str, Any]) -> None:
    save_file(dict(_weights(shape)), directory / "model.safetensors", {"format": "pt"})
    _tokenizer(shape["vocab_size"]).save(str(directory / "tokenizer.json"), pretty=False)
    files: dict[str, Any] = {
        "config.json": shape,
        "generation_config.json": {"eos_token_id": [shape["eos_token_id"]]},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": SPECIAL_TOKENS[2],
            "chat_template": "{% for message in messages %}<|im_start|>{{ message.role }}\n"
            "{{ message.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n",
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _weights(shape: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor: normal with the initializer's deviation, norms 1, biases 0."""
    generator = torch.Generator().manual_seed(SEED)
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    biased = shape["model_type"] == "qwen2"

    def drawn(*size: int) -> torch.Tensor:
        deviation: float = shape["initializer_range"]
        return (torch.randn(*size, generator=generator) * deviation).to(torch.bfloat16)

    def ones() -> torch.Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    yield "model.embed_tokens.weight", drawn(shape["vocab_size"], hidden)
    for index in range(shape["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        yield layer + "input_layernorm.weight", ones()
        yield layer + "post_attention_layernorm.weight", ones()
        for name, size in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv)):
            yield f"{layer}self_attn.{name}.weight", drawn(size, hidden)
            if biased:
                yield f"{layer}self_attn.{name}.bias", torch.zeros(size, dtype=torch.bfloat16)
        yield layer + "self_attn.o_proj.weight", drawn(hidden, hidden)
        yield layer + "mlp.gate_proj.weight", drawn(inner, hidden)
        yield layer + "mlp.up_proj.weight", drawn(inner, hidden)
        yield layer + "mlp.down_proj.weight", drawn(hidden, inner)
    yield "model.norm.weight", ones()


def _tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE of the right size: the bytes, then made-up words of one merge each."""
    fixed = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = list(islice(_merges(), vocab_size - len(fixed)))
    texts = [*fixed, *(left + right for left, right in merges)]
    vocabulary = {text: number for number, text in enumerate(texts[:vocab_size])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _merges() -> Iterator[tuple[str, str]]:
    """Yield merges whose parts are letters or what an earlier merge made."""
    pairs = ["".join(letters) for letters in product(ascii_lowercase, repeat=2)]
    yield from ((pair[0], pair[1]) for pair in pairs)
    yield from (("Ġ", pair) for pair in pairs)
    yield from (("Ġ" + first, second) for first, second in product(pairs, repeat=2))


if __name__ == "__main__":
    print(qwen_shaped_model(), llama_shaped_model(), sep="\n")
