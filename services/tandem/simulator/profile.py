"""What a machine costs: seconds of an iteration, of KV on a link; how many blocks it has."""

from __future__ import annotations

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

    def seconds(self, work: Work) -> float:
        """Return how long an iteration takes."""
        return (
            self.fixed
            + self.prompt_token * work.prompt_tokens
            + self.decode * work.decodes
            + self.context * work.context
            + self.attended * work.attended
        )


class LinkCost(_Frozen):
    """KV on its way: each worker sends and receives one piece at a time."""

    bytes_per_second: float = Field(gt=0)
    latency: float = Field(0.0, ge=0, description="seconds per piece beside its bytes")
    kv_bytes_per_token: float = Field(gt=0)
    layer_groups: int = Field(4, ge=1, description="pieces per chunk, sent as layers are computed")


class Profile(_Frozen):
    """One kind of worker, as `tandem simulate --profile` reads it."""

    name: str
    source: str = Field(description="where the figures come from: machine and versions, or formula")
    iteration: IterationCost
    link: LinkCost
    rpc_seconds: float = Field(0.0005, ge=0, description="one message between two processes")
    host_bytes_per_second: float = Field(
        8e9, gt=0, description="of copies of KV to and from host memory"
    )
    num_blocks: int = Field(ge=1, description="KV blocks per worker")
    max_model_len: int = Field(ge=2)


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
