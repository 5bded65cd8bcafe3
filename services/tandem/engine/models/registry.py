"""Which architectures can be served. One line each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tandem.engine.models.config import DecoderConfig, HFConfig
from tandem.engine.models.llama import read_llama
from tandem.engine.models.mistral import read_mistral
from tandem.engine.models.qwen2 import read_qwen2
from tandem.engine.models.qwen3 import read_qwen3

ARCHITECTURES: Mapping[str, Callable[[HFConfig], DecoderConfig]] = {
    "LlamaForCausalLM": read_llama,
    "MistralForCausalLM": read_mistral,
    "Qwen2ForCausalLM": read_qwen2,
    "Qwen3ForCausalLM": read_qwen3,
}


def read_decoder(hf: HFConfig) -> tuple[str, DecoderConfig]:
    """Return the architecture's name and the decoder; refuse one that is not supported."""
    named = hf.values.get("architectures") or []
    architecture = named[0] if isinstance(named, list) and named else None
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise hf.error("architectures", architecture, ", ".join(ARCHITECTURES))
    return architecture, ARCHITECTURES[architecture](hf)
