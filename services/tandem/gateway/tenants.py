"""On whose account a request is served: by its API key, else by what its client says.

This tells accounts apart; it does not keep anybody out. A key that no file names is an account of
its own, under a name that does not give the key away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import yaml

from tandem.core.errors import ConfigError

_SCHEME = "bearer "


class Tenants:
    """Knows which tenant an API key belongs to."""

    def __init__(self, by_key: Mapping[str, str] | None = None) -> None:
        self._by_key = dict(by_key or {})

    def of(self, authorization: str, claimed: str) -> str:
        """Return the tenant of a request.

        `authorization`: the header's value (`Bearer KEY`), or empty. `claimed`: the tenant that the
        client or a proxy in front of us names; it counts only where the key names none, so that
        nobody is served on the account of a key that is not theirs.
        """
        key = authorization[len(_SCHEME) :].strip()
        if authorization[: len(_SCHEME)].lower() != _SCHEME or not key:
            return claimed
        if (tenant := self._by_key.get(key)) is not None:
            return tenant
        return claimed or f"key-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def load_tenants(path: str) -> Tenants:
    """Read a YAML file that maps API keys to tenants; no path, no names.

    Raises `ConfigError` naming the file and what is wrong with it, never a key.
    """
    if not path:
        return Tenants()
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not YAML"
        raise ConfigError(f"gateway.api_keys_file: cannot read {path}: {reason}") from error
    if not isinstance(content, dict) or not all(
        isinstance(part, str) and part for pair in content.items() for part in pair
    ):
        raise ConfigError(
            f"gateway.api_keys_file: {path} must map API keys to tenants, one `key: tenant` a line"
        )
    return Tenants(content)
