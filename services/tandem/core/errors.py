"""The error hierarchy. Each error knows its HTTP status and its gRPC code.

Anything that is not a `TandemError` and reaches an edge is a bug and is reported as 500 / INTERNAL.
"""

from __future__ import annotations

from typing import ClassVar

# google.rpc.Code values, so that this package needs no gRPC.
INVALID_ARGUMENT = 3
DEADLINE_EXCEEDED = 4
NOT_FOUND = 5
RESOURCE_EXHAUSTED = 8
FAILED_PRECONDITION = 9
INTERNAL = 13
UNAVAILABLE = 14


class TandemError(Exception):
    """Base of everything that Tandem raises on purpose."""

    http_status: ClassVar[int] = 500
    grpc_code: ClassVar[int] = INTERNAL
    openai_type: ClassVar[str] = "internal_server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        """The request field that is at fault, if one is."""
        self.code = code
        """A short machine-readable reason, such as `context_length_exceeded`."""


class InvalidRequestError(TandemError):
    """The request can never succeed as it stands."""

    http_status = 400
    grpc_code = INVALID_ARGUMENT
    openai_type = "invalid_request_error"


class ModelNotFoundError(InvalidRequestError):
    """The request names a model that is not served here."""

    http_status = 404
    grpc_code = NOT_FOUND


class PayloadTooLargeError(InvalidRequestError):
    """The body is over the configured size."""

    http_status = 413


class OverloadedError(TandemError):
    """Every queue is full. `retry_after` is the hint for the client, in seconds."""

    http_status = 429
    grpc_code = RESOURCE_EXHAUSTED
    openai_type = "rate_limit_error"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message, code="overloaded")
        self.retry_after = retry_after


class UnavailableError(TandemError):
    """No worker can take the request now."""

    http_status = 503
    grpc_code = UNAVAILABLE
    openai_type = "service_unavailable_error"


class DeadlineExceededError(TandemError):
    """A stage's or the client's deadline passed."""

    http_status = 504
    grpc_code = DEADLINE_EXCEEDED
    openai_type = "timeout_error"


class StaleError(TandemError):
    """A message or transfer whose stamp (incarnation, epoch, attempt) is no longer current."""

    http_status = 409
    grpc_code = FAILED_PRECONDITION


class PeerMismatchError(TandemError):
    """Two workers do not agree on what a KV block is. The message names both values."""

    grpc_code = FAILED_PRECONDITION


class ModelLoadError(TandemError):
    """A model directory is missing, damaged or of an unsupported architecture."""


class ConfigError(TandemError):
    """A configuration value is not allowed. The message names field, value and allowed range."""


class IntegrityError(TandemError):
    """An invariant of the block pool is broken. Always a bug."""
