"""Tiny random models of every architecture, with a tokenizer and a chat template, saved as real
models are.

Made through `transformers`, so that the files are what its users have.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB_SIZE = 260
BOS, EOS, IM_START, IM_END = 256, 257, 258, 259
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _llama(**changes: Any) -> Any:
    return transformers.LlamaConfig(**{**_SHAPE, **changes})


def _mistral(**changes: Any) -> Any:
    return transformers.MistralConfig(**{**_SHAPE, **changes})


def _qwen2(**changes: Any) -> Any:
    return transformers.Qwen2Config(**{**_SHAPE, **changes})


def _qwen3(**changes: Any) -> Any:
    return transformers.Qwen3Config(**{**_SHAPE, **changes})


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "llama-mha": lambda: _llama(num_key_value_heads=4),
    "llama-biases": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama3-rope": lambda: _llama(rope_parameters=_LLAMA3_ROPE),
    "llama-linear-rope": lambda: _llama(
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "mistral": lambda: _mistral(sliding_window=None),
    "mistral-window": lambda: _mistral(sliding_window=12),
    "qwen2": _qwen2,
    "qwen2-tied": lambda: _qwen2(tie_word_embeddings=True),
    "qwen2-window": lambda: _qwen2(use_sliding_window=True, sliding_window=12, max_window_layers=1),
    "qwen3": lambda: _qwen3(head_dim=20),
    "qwen3-biases": lambda: _qwen3(head_dim=16, attention_bias=True, tie_word_embeddings=True),
}


def make_tiny_model(architecture: str, directory: Path, seed: int = 0) -> Path:
    """Save a random float32 model of one of `ARCHITECTURES` in `directory` and return that.

    Random weights are larger than at a usual initialisation, so that the model's choices differ
    from token to token and depend on the whole context.
    """
    config = ARCHITECTURES[architecture]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.25)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=[EOS, IM_END], bos_token_id=BOS
    )
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    _tokenizer().save_pretrained(directory)
    return directory


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE with no merges: one token per byte, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
    )
