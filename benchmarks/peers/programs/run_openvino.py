"""OpenVINO GenAI's continuous batching in process: MODEL_DIRECTORY CACHE_TYPE THREADS.

CACHE_TYPE is the precision of its KV cache, or "default" for its own choice (u8).
"""

import time
from itertools import count

import numpy
import openvino
import openvino_genai
from protocol import Generate, serve

CACHE_GIB = 1
TOKENS_PER_ITERATION = 1024


def load(arguments: list[str]) -> tuple[str, Generate]:
    directory, cache_type, threads = arguments
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GIB
    scheduler.max_num_batched_tokens = TOKENS_PER_ITERATION
    properties = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": int(threads)}
    if cache_type != "default":
        properties["KV_CACHE_PRECISION"] = cache_type
    pipeline = openvino_genai.ContinuousBatchingPipeline(directory, scheduler, "CPU", properties)
    numbers = count()

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[float]]:
        options = openvino_genai.GenerationConfig()
        options.max_new_tokens = options.min_new_tokens = max_tokens
        options.ignore_eos = True
        options.do_sample = False
        handles = [
            pipeline.add_request(
                next(numbers), openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)), options
            )
            for prompt in prompts
        ]
        times: list[list[float]] = [[] for _ in prompts]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            now = time.perf_counter()
            for handle, moments in zip(handles, times, strict=True):
                while handle.can_read():
                    outputs = handle.read()
                    moments.extend([now] * sum(len(o.generated_ids) for o in outputs.values()))
        return times

    return f"OpenVINO GenAI {openvino_genai.__version__}", generate


if __name__ == "__main__":
    serve(load)
