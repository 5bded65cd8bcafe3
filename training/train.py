"""Trains the bundled model: `python -m training.train --out FOLDER`.

Tokenizer, then weights, on CPU from one seed; saves a Hugging Face directory with the weights
rounded to bfloat16. It does not judge the result: `training.evaluate` does, on what was saved.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from training.corpus import IGNORED, Batch, Packer, any_dialogue, phrasings
from training.dialogue import END, PAD
from training.questions import Entry, Varier, load_entries
from training.tokenizer import CONTEXT, VOCABULARY, save_tokenizer, train_tokenizer

SEED = 20240
ROWS = 8
LENGTH = 320
STEPS = 2600
WARMUP = 100
FALL = 0.8
HIDDEN_RATE = 0.015
OTHER_RATE = 3e-3
SAVE_EVERY = 500
ROPE_THETA = 10000.0
SHARPNESS = 2.0
END_WEIGHT = 3.0


def model_config(tokenizer: Tokenizer) -> Qwen3Config:
    """The shape: a small Qwen3 decoder with grouped-query attention and tied embeddings."""
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
        use_cache=True,
    )


def tokenizer_texts(entries: Sequence[Entry]) -> Iterator[str]:
    """What the tokenizer learns from: every answer and phrasing, and a sample of the mix."""
    for entry in entries:
        yield from (*entry.questions, entry.answer)
    rng = random.Random(SEED)
    known, vary = phrasings(entries), Varier(entries)
    for _ in range(4000):
        for message in any_dialogue(known, vary, rng).messages:
            yield message.content


def optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    hidden: list[torch.nn.Parameter] = []
    other: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and "layers." in name
        (hidden if inside else other).append(parameter)
    return [
        torch.optim.Muon(hidden, lr=HIDDEN_RATE, momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(other, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def sharpen(model: Qwen3ForCausalLM) -> None:
    """Start with sharper attention than unit query and key norms allow on heads this small.

    Copying and comparing need a head that picks out one token, and the norms grow slowly.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.constant_(parameter, SHARPNESS)


def rate_at(step: int, steps: int) -> float:
    """The share of the peak learning rate: warm-up, a plateau, then a straight fall to zero."""
    fall = int(steps * FALL)
    return min(1.0, (step + 1) / WARMUP, (steps - step) / fall)


def batch_loss(model: Qwen3ForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the learned tokens; logits are made for those positions alone.

    The end token weighs more: it decides how far a count goes, and is one token among dozens.
    """
    targets = batch.labels[:, 1:]
    learned = targets != IGNORED
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(
            input_ids=batch.tokens,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][learned])
    weights = torch.ones(VOCABULARY)
    weights[model.config.eos_token_id] = END_WEIGHT
    return functional.cross_entropy(logits.float(), targets[learned], weight=weights)


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the Hugging Face directory, weights rounded to bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    rounded = Qwen3ForCausalLM(model.config)
    rounded.load_state_dict(model.state_dict())
    rounded.bfloat16()
    rounded.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    rounded.save_pretrained(str(folder))
    save_tokenizer(tokenizer, folder)
    (folder / "model.safetensors").chmod(0o644)
    # Readers that predate `rope_parameters` look for the base at the top level.
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"rope_theta": ROPE_THETA}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def train(out: Path, steps: int, save_every: int = SAVE_EVERY) -> None:
    """Train for `steps` batches and leave the model in `out`."""
    torch.manual_seed(SEED)
    entries = load_entries()
    tokenizer = train_tokenizer(tokenizer_texts(entries))
    model = Qwen3ForCausalLM(model_config(tokenizer)).train()
    sharpen(model)
    packer = Packer(entries, tokenizer, ROWS, LENGTH, SEED)
    makers = optimizers(model)
    peaks = [group["lr"] for maker in makers for group in maker.param_groups]
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(entries)} entries, {size:,} parameters, {steps} steps", flush=True)
    start, recent = time.monotonic(), 0.0
    for step in itertools.count():
        if step == steps or (step and step % save_every == 0):
            save(model, tokenizer, out)
        if step == steps:
            break
        for group, peak in zip((g for m in makers for g in m.param_groups), peaks, strict=True):
            group["lr"] = peak * rate_at(step, steps)
        loss = batch_loss(model, packer.batch())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for maker in makers:
            maker.step()
            maker.zero_grad()
        recent = loss.item() if step == 0 else 0.95 * recent + 0.05 * loss.item()
        if step % 20 == 0:
            _report(step, steps, recent, time.monotonic() - start)


def _report(step: int, steps: int, loss: float, elapsed: float) -> None:
    each = elapsed / (step + 1)
    left = (steps - step - 1) * each / 60
    speed = ROWS * LENGTH / each
    print(
        f"step {step:5d}/{steps}  loss {loss:.4f}  {speed:,.0f} tokens/s  {left:.1f} min left",
        flush=True,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/bundled_model"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--save-every", type=int, default=SAVE_EVERY)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.out, arguments.steps, arguments.save_every)


if __name__ == "__main__":
    main()
