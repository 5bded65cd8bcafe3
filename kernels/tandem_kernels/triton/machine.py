"""What the launch code asks about the device: is it the interpreter, how many processors has it."""

from __future__ import annotations

from functools import cache

import torch

_INTERPRETED_PROCESSORS = 4


def interpreted(device: torch.device) -> bool:
    """Whether kernels on this device run on Triton's interpreter, where small tiles are cheaper."""
    return device.type == "cpu"


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
