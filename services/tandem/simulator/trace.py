"""Requests to simulate: Azure's CSV, Mooncake's JSON lines, and JSON lines of our own.

Our own: one object per line with `arrival` (seconds), `prompt`, `output` (tokens) and, where
wanted, `tenant`, `priority`, `ttft_objective`, `itl_objective` (seconds) and `hash_ids`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tandem.core.errors import ConfigError

HASHED_TOKENS = 512
"""Tokens that one entry of `hash_ids` stands for, as in Mooncake's traces."""


class TraceRequest(NamedTuple):
    """One request. `arrival` in seconds since the start of the trace."""

    arrival: float
    prompt_len: int
    output_len: int
    hash_ids: tuple[int, ...] = ()
    """Names of its blocks of `HASHED_TOKENS` tokens: equal names, equal prefixes."""
    tenant: str = ""
    priority: int = 0
    ttft_objective: float = 0.0
    itl_objective: float = 0.0


def read_trace(path: Path, limit: int | None = None, speed: float = 1.0) -> list[TraceRequest]:
    """Read a trace of any known format, its first `limit` requests, in order of arrival.

    `speed` 2 lets them come twice as fast. Raises `ConfigError` naming file and line.
    """
    try:
        with path.open(encoding="utf-8") as file:
            requests = list(islice(_parse(file, path), limit))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if not requests:
        raise ConfigError(f"{path}: no requests")
    requests.sort(key=lambda request: request.arrival)
    start = requests[0].arrival
    return [request._replace(arrival=(request.arrival - start) / speed) for request in requests]


def _parse(lines: Iterable[str], path: Path) -> Iterator[TraceRequest]:
    number = 0
    is_azure = False
    for number, line in enumerate(lines, start=1):
        try:
            if number == 1 and line.startswith("TIMESTAMP,"):
                is_azure = True
            elif line.strip():
                yield _checked(_azure(line) if is_azure else _json(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {number}: not a request: {error!r}") from error


def _azure(line: str) -> TraceRequest:
    """TIMESTAMP,ContextTokens,GeneratedTokens; seven digits after the seconds."""
    moment, prompt, output = next(csv.reader([line]))
    seconds, _, fraction = moment.partition(".")
    arrival = datetime.fromisoformat(f"{seconds}+00:00").timestamp() + float(f"0.{fraction or 0}")
    return TraceRequest(arrival, int(prompt), int(output))


def _json(record: dict[str, Any]) -> TraceRequest:
    hash_ids = tuple(record.get("hash_ids", ()))
    if "input_length" in record:  # Mooncake: milliseconds
        lengths = int(record["input_length"]), int(record["output_length"])
        return TraceRequest(record["timestamp"] / 1000, *lengths, hash_ids)
    return TraceRequest(
        float(record["arrival"]),
        int(record["prompt"]),
        int(record["output"]),
        hash_ids,
        str(record.get("tenant", "")),
        int(record.get("priority", 0)),
        float(record.get("ttft_objective", 0.0)),
        float(record.get("itl_objective", 0.0)),
    )


def _checked(request: TraceRequest) -> TraceRequest:
    if request.prompt_len < 1 or request.output_len < 0:
        raise ValueError(f"{request.prompt_len} prompt and {request.output_len} output tokens")
    return request._replace(output_len=max(1, request.output_len))
