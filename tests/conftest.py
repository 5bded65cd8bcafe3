"""Settings that hold for every test."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton reads this when it is first imported, whoever imports it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("tandem", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("tandem")
