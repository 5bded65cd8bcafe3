"""What the gateway is told of a request on a decode worker: every token, and how the first came."""

from __future__ import annotations

import time

from tandem.core.request import FinishReason, SampledToken
from tandem.decode.active import ActiveRequest
from tandem.v1 import worker_pb2
from tandem.wire import finish_reason_to_proto, position_logprobs_to_proto


def token_output(
    active: ActiveRequest, sampled: SampledToken, reason: FinishReason | None
) -> worker_pb2.SequenceOutput:
    """Return the output for the token that was appended last; `reason`: why it is the last one."""
    request, sequence = active.request, active.sequence
    index = sequence.num_output_tokens - 1
    output = worker_pb2.SequenceOutput(
        request_id=request.request_id,
        attempt=request.attempt,
        output_index=index,
        token_ids=(sampled.token_id,),
        finish_reason=finish_reason_to_proto(reason),
        handover=active.handover,
    )
    if sampled.logprobs is not None:
        output.logprobs.append(position_logprobs_to_proto(sampled.logprobs))
    if index == 0:
        output.prompt_logprobs.extend(map(position_logprobs_to_proto, active.prompt_logprobs))
    if reason == "stop":
        output.stop_token_id = sampled.token_id
    if sequence.num_tokens == len(request.token_ids) + 1:
        output.first.CopyFrom(_first_token_info(active))
    return output


def _first_token_info(active: ActiveRequest) -> worker_pb2.FirstTokenInfo:
    """How the first token of this attempt came about."""
    now = active.first_token_at or time.monotonic()
    started = active.started_at or now
    return worker_pb2.FirstTokenInfo(
        cached_tokens=active.cached_tokens or 0,
        queue_seconds=started - active.submitted_at,
        prefill_seconds=now - started,
        prefill_worker=active.prefill_worker,
    )
