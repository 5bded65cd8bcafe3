"""transformers' continuous batching in process: MODEL_DIRECTORY THREADS."""

import torch
import transformers
from protocol import Generate, serve
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

PAGE_SIZE = 256
PAGES = 64
TOKENS_PER_ITERATION = 2048
NO_EOS = -1


def load(arguments: list[str]) -> tuple[str, Generate]:
    directory, threads = arguments
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    batching = ContinuousBatchingConfig(
        page_size=PAGE_SIZE,
        num_blocks=PAGES,
        max_batch_tokens=TOKENS_PER_ITERATION,
        use_cuda_graph=False,
        allow_block_sharing=False,
    )
    options = GenerationConfig(do_sample=False, eos_token_id=NO_EOS, pad_token_id=0)
    manager = model.init_continuous_batching(options, batching)
    manager.start()

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[float]]:
        names = [
            manager.add_request(
                prompt, max_new_tokens=max_tokens, record_timestamps=True, eos_token_id=NO_EOS
            )
            for prompt in prompts
        ]
        times: dict[str, list[float]] = {}
        for result in manager:
            if result.error:
                raise RuntimeError(result.error)
            if result.is_finished():
                times[result.request_id] = result.timestamps
            if len(times) == len(names):
                break
        return [times[name] for name in names]

    return f"transformers {transformers.__version__}", generate


if __name__ == "__main__":
    serve(load)
