"""A request on the wire: `Submit` to a decode worker, `PrefillRequest` on to a prefill worker."""

from __future__ import annotations

from collections.abc import Iterable

from tandem.core.errors import InvalidRequestError
from tandem.core.request import Request
from tandem.v1 import worker_pb2
from tandem.wire.sampling import sampling_from_proto, sampling_to_proto


def request_to_submit(
    request: Request, prefill: worker_pb2.PrefillTarget | None = None
) -> worker_pb2.Submit:
    """Return the submission of a request; without `prefill` the decode worker prefills it."""
    return worker_pb2.Submit(
        request_id=request.request_id,
        attempt=request.attempt,
        token_ids=request.token_ids,
        prompt_len=request.prompt_len,
        sampling=sampling_to_proto(request.sampling),
        priority=request.priority,
        cache_salt=request.cache_salt,
        tenant=request.tenant,
        ttft_objective=request.ttft_objective,
        itl_objective=request.itl_objective,
        prefill=prefill,
    )


def request_from_submit(message: worker_pb2.Submit) -> Request:
    """Return the submitted request; `InvalidRequestError` if the message contradicts itself."""
    return _request(message)


def request_to_prefill(
    request: Request,
    *,
    leg_id: int,
    token_ids: Iterable[int] | None = None,
    held_tokens: int | None = None,
    keep: bool = False,
) -> worker_pb2.PrefillRequest:
    """Return one leg of a request.

    `token_ids` are all tokens that get KV (the request's own if None: pass the sequence's when it
    has sampled since). `held_tokens` is set when the blocks are reserved already: the leg then
    carries its grant. `keep`: there are no blocks now, the prefill worker is to decode it itself.
    """
    grant = None
    if held_tokens is not None:
        grant = worker_pb2.Grant(leg_id=leg_id, held_tokens=held_tokens)
    return worker_pb2.PrefillRequest(
        leg_id=leg_id,
        request_id=request.request_id,
        attempt=request.attempt,
        token_ids=request.token_ids if token_ids is None else token_ids,
        prompt_len=request.prompt_len,
        sampling=sampling_to_proto(request.sampling),
        priority=request.priority,
        cache_salt=request.cache_salt,
        tenant=request.tenant,
        ttft_objective=request.ttft_objective,
        itl_objective=request.itl_objective,
        grant=grant,
        keep=keep,
    )


def request_from_prefill(message: worker_pb2.PrefillRequest) -> Request:
    """Return the request of a leg; `InvalidRequestError` if the message contradicts itself."""
    return _request(message)


def _request(message: worker_pb2.Submit | worker_pb2.PrefillRequest) -> Request:
    if not 1 <= message.prompt_len <= len(message.token_ids):
        raise InvalidRequestError(
            f"prompt_len must be between 1 and the number of token ids ({len(message.token_ids)}), "
            f"got {message.prompt_len}",
            param="prompt_len",
        )
    return Request(
        request_id=message.request_id,
        token_ids=tuple(message.token_ids),
        prompt_len=message.prompt_len,
        sampling=sampling_from_proto(message.sampling),
        attempt=message.attempt,
        priority=message.priority,
        cache_salt=message.cache_salt,
        tenant=message.tenant,
        ttft_objective=message.ttft_objective,
        itl_objective=message.itl_objective,
    )
