"""What has to be in the environment before Ray is imported: Ray reads it once, when it is loaded.

So this module must not import Ray, and whoever imports `session` calls `prepare_environment` first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def prepare_environment() -> None:
    """No usage reports, no advice about accelerators, no low priority; and the token, if any.

    Ray makes a token for a cluster of its own, but does not look for it when it connects to one
    that runs already, unless it is told to.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray runs its workers at nice 15: anything else on the machine would starve the model.
    os.environ.setdefault("RAY_worker_niceness", "0")
    given = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    has_token = bool(given) or (Path.home() / ".ray" / "auth_token").is_file()
    # Once Ray is loaded, its children would read this and it would not: they could not talk.
    if has_token and "ray" not in sys.modules:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
