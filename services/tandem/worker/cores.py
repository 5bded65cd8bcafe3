"""How many threads a process of a worker gives its model."""

from __future__ import annotations

import os

from tandem.core.config import TandemConfig


def default_threads(config: TandemConfig) -> int:
    """This machine's cores, shared equally by every rank of every worker."""
    ranks = config.controller.decode_workers * config.decode.tensor_parallel
    if config.worker.disaggregated:
        ranks += config.controller.prefill_workers * config.prefill.tensor_parallel
    return max(1, (os.cpu_count() or 1) // ranks)
