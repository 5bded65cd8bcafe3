"""Small arrays from the host to a device, without waiting for what the device computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def upload(array: np.ndarray[Any, Any], device: torch.device | str) -> Tensor:
    """Return `array` on a device. On CPUs it shares the array's memory.

    To CUDA it goes through pinned memory, queued behind what the stream has to do; a copy from
    ordinary memory would wait for all of it.
    """
    tensor = torch.from_numpy(array)
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
