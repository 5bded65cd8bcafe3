"""Errors on the wire: what a worker tells the gateway about a request that it cannot finish.

Only a request that can never succeed (`InvalidRequestError`) is final. Everything else is marked
retriable: the fault lies with the worker or its load, and the gateway bounds the attempts.
"""

from __future__ import annotations

from tandem.core import errors
from tandem.core.errors import TandemError
from tandem.v1 import worker_pb2

_BY_CODE: dict[int, type[TandemError]] = {
    error.grpc_code: error
    for error in (
        errors.InvalidRequestError,
        errors.ModelNotFoundError,
        errors.OverloadedError,
        errors.UnavailableError,
        errors.DeadlineExceededError,
        errors.StaleError,
    )
}


def error_to_failed(error: Exception, request_id: str, attempt: int) -> worker_pb2.RequestFailed:
    """Return the failure of one attempt; a foreign error is INTERNAL and named by its type."""
    ours = isinstance(error, TandemError)
    return worker_pb2.RequestFailed(
        request_id=request_id,
        attempt=attempt,
        grpc_code=error.grpc_code if isinstance(error, TandemError) else errors.INTERNAL,
        message=str(error) if ours else f"{type(error).__name__}: {error}",
        retriable=not isinstance(error, errors.InvalidRequestError),
    )


def failed_to_error(message: worker_pb2.RequestFailed) -> TandemError:
    """Return the error that an edge answers with; an unknown code is a plain `TandemError`."""
    return _BY_CODE.get(message.grpc_code, TandemError)(message.message)
