"""Where the configuration comes from: flags over environment over a YAML file over the defaults.

The settings themselves are `tandem.core.config`. Every error is a `ConfigError` that names the
setting, the value, what is allowed, and where the value came from.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from tandem.core.config import TandemConfig
from tandem.core.errors import ConfigError

ENV_PREFIX = "TANDEM_"
ENV_DELIMITER = "__"

FLAGS: Mapping[str, str] = {
    "model.path": "--model",
    "model.served_name": "--served-model-name",
    "model.dtype": "--dtype",
    "model.max_model_len": "--max-model-len",
    "cache.block_size": "--block-size",
    "cache.num_blocks": "--num-blocks",
    "cache.prefix_cache": "--prefix-cache/--no-prefix-cache",
    "scheduler.policy": "--policy",
    "scheduler.prefill_policy": "--prefill-policy",
    "scheduler.decode_policy": "--decode-policy",
    "scheduler.itl_objective": "--itl-objective",
    "lending.mode": "--lending",
    "scheduler.chunk_size": "--chunk-size",
    "scheduler.max_batch_tokens": "--max-batch-tokens",
    "scheduler.max_running": "--max-running",
    "transfer.backend": "--transfer-backend",
    "worker.threads": "--threads",
    "worker.disaggregated": "--disaggregation/--no-disaggregation",
    "worker.local_prefill_max_tokens": "--local-prefill-max-tokens",
    "prefill.tensor_parallel": "--prefill-tensor-parallel",
    "decode.tensor_parallel": "--decode-tensor-parallel",
    "gateway.host": "--host",
    "gateway.port": "--port",
    "gateway.grpc_port": "--grpc-port",
    "gateway.processes": "--gateways",
    "gateway.metrics_port": "--metrics-port",
    "gateway.router.policy": "--routing-policy",
    "controller.host": "--controller-host",
    "controller.port": "--controller-port",
    "controller.prefill_workers": "--prefill-workers",
    "controller.decode_workers": "--decode-workers",
    "controller.cpus_per_worker": "--cpus-per-worker",
    "controller.gpus_per_worker": "--gpus-per-worker",
    "controller.dashboard": "--dashboard/--no-dashboard",
    "controller.dashboard_port": "--dashboard-port",
    "log_level": "--log-level",
}
"""Setting -> flag. Every other setting has `--set section.field=value`."""

Sources = dict[tuple[str, ...], str]


def load_config(file: str = "", flags: Mapping[str, object] | None = None) -> TandemConfig:
    """Return the configuration. `file` is a path, "-" for standard input, or "" for none.

    `flags` maps dotted setting names to values. Raises `ConfigError`.
    """
    merged: dict[str, Any] = {}
    sources: Sources = {}
    layers = [(_read_file(file), file), (_read_environment(), "environment")]
    for values, origin in layers:
        _merge(merged, values, origin, sources)
    for name, value in (flags or {}).items():
        flag = FLAGS.get(name, f"--set {name}").split("/")[0]
        _merge(merged, _nest(name, value), flag, sources)
    try:
        return TandemConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(
            "\n".join(_explain(entry, sources) for entry in error.errors())
        ) from error


def dump_config(config: TandemConfig) -> str:
    """Return the configuration as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def walk_settings(
    model: type[BaseModel] = TandemConfig, prefix: str = ""
) -> Iterator[tuple[str, FieldInfo]]:
    """Yield every setting with its dotted name, in the order of the models."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from walk_settings(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def allowed(field: FieldInfo) -> str:
    """What a setting may be, in words."""
    if get_origin(field.annotation) is Literal:
        return "one of " + ", ".join(str(value) for value in get_args(field.annotation))
    if field.annotation is bool:
        return "true or false"
    kinds: dict[object, str] = {int: "a whole number", float: "a number", str: "text"}
    kind = kinds[field.annotation]
    low, high = "", ""
    for constraint in field.metadata:
        for attribute, words in (("ge", "at least"), ("gt", "above")):
            if (bound := getattr(constraint, attribute, None)) is not None:
                low = f"{words} {bound}"
        for attribute, words in (("le", "at most"), ("lt", "below")):
            if (bound := getattr(constraint, attribute, None)) is not None:
                high = f"{words} {bound}"
    return " ".join(part for part in (kind, " and ".join(filter(None, (low, high)))) if part)


def environment_variable(name: str) -> str:
    """The environment variable of a setting."""
    return ENV_PREFIX + name.replace(".", ENV_DELIMITER).upper()


# -- reading ---------------------------------------------------------------------------------


def _read_file(file: str) -> dict[str, Any]:
    if not file:
        return {}
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{file} (--config): cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} (--config): not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file} (--config): expected sections and settings, found {content!r}")
    return content


def _read_environment() -> dict[str, Any]:
    fields: dict[str, Any] = {
        name: (field.annotation, field) for name, field in TandemConfig.model_fields.items()
    }

    class Environment(BaseSettings):
        model_config = SettingsConfigDict(
            env_prefix=ENV_PREFIX, env_nested_delimiter=ENV_DELIMITER, extra="ignore"
        )

    settings = create_model("TandemEnvironment", __base__=Environment, **fields)
    try:
        return EnvSettingsSource(settings)()
    except SettingsError as error:
        section = next((name for name in fields if f'"{name}"' in str(error)), "section")
        raise ConfigError(
            f"{ENV_PREFIX}{section.upper()} (environment) must be a JSON object; a single setting "
            f"is named like {environment_variable('gateway.port')}"
        ) from error


def _nest(name: str, value: object) -> dict[str, Any]:
    nested: Any = value
    for part in reversed(name.split(".")):
        nested = {part: nested}
    return dict(nested)


def _merge(
    into: dict[str, Any],
    values: Mapping[str, Any],
    origin: str,
    sources: Sources,
    path: tuple[str, ...] = (),
) -> None:
    for key, value in values.items():
        here = (*path, str(key))
        if isinstance(value, Mapping):
            below = into.get(key)
            into[key] = below if isinstance(below, dict) else {}
            sources.setdefault(here, origin)
            _merge(into[key], value, origin, sources, here)
        else:
            into[key] = value
            sources[here] = origin


# -- explaining ------------------------------------------------------------------------------


def _explain(error: ErrorDetails, sources: Sources) -> str:
    path = tuple(str(part) for part in error["loc"])
    name = ".".join(path)
    origin = _origin_of(path, sources)
    fields = dict(walk_settings())
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, fields, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{name} ({origin}): there is no such setting{hint}"
    if name in fields:
        return f"{name} must be {allowed(fields[name])}, got {error['input']!r} ({origin})"
    return f"{name} must be a section with settings, got {error['input']!r} ({origin})"


def _origin_of(path: tuple[str, ...], sources: Sources) -> str:
    origin = sources.get(path, "default")
    return (
        f"from {environment_variable('.'.join(path))}"
        if origin == "environment"
        else f"from {origin}"
    )
