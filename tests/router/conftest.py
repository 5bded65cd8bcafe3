"""Property tests here are deterministic and have no deadline: a slow machine is no failure."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("tandem", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("tandem")
