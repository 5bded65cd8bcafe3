"""What a machine costs: seconds of an iteration, of KV on a link; how many blocks it has."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tandem.core.errors import ConfigError
from tandem.scheduler.costs import Work


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class IterationCost(_Frozen):
    """Seconds of an iteration: a sum of terms in its work."""

    fixed: float = Field(gt=0)
    prompt_token: float = Field(ge=0)
    decode: float = Field(ge=0, description="per sequence that decodes")
    context: float = Field(ge=0, description="per token of KV that decodes read")
    attended: float = Field(0.0, ge=0, description="per pair of a prompt token and an earlier one")
    prompt: float = Field(0.0, ge=0, description="more if it has any prompt tokens")
    knee: int = Field(0, ge=0, description="sequences up to which one more costs `decode`")
    beyond_knee: float = Field(0.0, ge=0, description="what each that comes after costs besides")
    jitter: tuple[float, ...] = Field(
        (), description="equally likely deviations of one iteration, in seconds; empty: none"
    )

    def seconds(self, work: Work) -> float:
        """Return how long an iteration takes on average."""
        return (
            self.fixed
            + (self.prompt if work.prompt_tokens else 0.0)
            + self.prompt_token * work.prompt_tokens
            + self.decode * work.decodes
            + self.beyond_knee * max(0, work.decodes - self.knee)
            + self.context * work.context
            + self.attended * work.attended
        )


class LinkCost(_Frozen):
    """KV on its way: each worker sends and receives one piece at a time."""

    bytes_per_second: float = Field(gt=0)
    latency: float = Field(0.0, ge=0, description="seconds per piece beside its bytes")
    kv_bytes_per_token: float = Field(gt=0)
    layer_groups: int = Field(4, ge=1, description="pieces per chunk, sent as layers are computed")


class SharedMachine(_Frozen):
    """What workers of one machine do to each other's iterations."""

    workers: int = Field(
        1, ge=1, description="on one machine, of both roles in turn; 1: no sharing"
    )
    prefill: float = Field(
        1.0, ge=1, description="times longer a prefill worker's iteration is while another computes"
    )
    decode: float = Field(1.0, ge=1, description="the same of a decode worker")

    def slowdown(self, role: str) -> float:
        """Return how many times longer an iteration is beside one of another worker."""
        return self.prefill if role == "prefill" else self.decode


class Measured(_Frozen):
    """Where, when and how well the figures were measured; absent where they were computed."""

    date: str
    machine: dict[str, str]
    versions: dict[str, str]
    model: str
    samples: int = Field(ge=1)
    fit_error_p50: float = Field(ge=0, description="|fitted - measured| / measured")
    fit_error_max: float = Field(ge=0)


class Profile(_Frozen):
    """One kind of worker, as `tandem profile` writes it and `tandem simulate --profile` reads it.

    ::

        a prompt computed by its decode worker:  gateway + rpc + iterations + rpc
        by a prefill worker:                     gateway + 2 rpc + iterations + 2 rpc
    """

    name: str
    source: str = Field(description="where the figures come from: machine and versions, or formula")
    iteration: IterationCost
    link: LinkCost | None = Field(None, description="needed wherever there are prefill workers")
    rpc_seconds: float = Field(0.0005, ge=0, description="one message between two processes")
    host_bytes_per_second: float = Field(
        8e9, gt=0, description="of copies of KV to and from host memory"
    )
    gateway_seconds: float = Field(0.0, ge=0, description="a request in the gateway, both ways")
    shared: SharedMachine = SharedMachine()
    num_blocks: int = Field(ge=1, description="KV blocks per worker")
    max_model_len: int = Field(ge=2)
    measured: Measured | None = None


def save_profile(profile: Profile, path: Path) -> None:
    """Write a profile: JSON if the name says so, else YAML. Raises `ConfigError`."""
    content = profile.model_dump(mode="json", exclude_none=True)
    if path.suffix == ".json":
        text = json.dumps(content, indent=2) + "\n"
    else:
        text = yaml.safe_dump(content, sort_keys=False, width=100)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error


def load_profile(path: Path) -> Profile:
    """Read a profile from YAML or JSON. Raises `ConfigError`."""
    try:
        return Profile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{path}: {wrong}") from error
