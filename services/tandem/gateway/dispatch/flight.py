"""One request in flight: what it asked for, what it has received, where it is now.

State and checks only; sending and routing are `traffic`'s. Invariant: `emitted` holds exactly the
tokens that were handed to the consumer, in order, and it grows only by outputs of the current
attempt that begin where it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from tandem.core.errors import TandemError
from tandem.core.request import FinishReason, PositionLogprobs, Request
from tandem.gateway.dispatch.mailbox import Item, Mailbox, Wakeups
from tandem.gateway.dispatch.stream import DecodeStream
from tandem.gateway.dispatch.view import Member
from tandem.gateway.interfaces import HandoverTimes, OutputEvent, StageTimes
from tandem.kvcache.hashing import extend_hashes
from tandem.v1 import inference_pb2, worker_pb2
from tandem.wire import as_on_the_wire, finish_reason_from_proto, position_logprobs_from_proto

Verdict = Literal["accepted", "stale", "gap"]


class Flight:
    """A request between its first dispatch and its end.

    `wire_id` names it inside the cluster. It is unique where `request_id`, which a client may
    choose, is not: two requests of one name never share blocks, messages or load.
    """

    def __init__(
        self, request: Request, wire_id: str, max_model_len: int, wakeups: Wakeups
    ) -> None:
        self.request = replace(request, sampling=as_on_the_wire(request.sampling))
        self.wire_id = wire_id
        self.attempt = request.attempt - 1
        self.dispatches = 0
        self.emitted: list[int] = []
        self.stream: DecodeStream | None = None
        """Where the current attempt runs; None while it waits for a worker."""
        self.prefill: Member | None = None
        """Who prefills for the current attempt; None: the decode worker itself."""
        self.avoid: set[str] = set()
        """Decode workers that failed this request."""
        self.recovery: str | None = None
        """Why it is being moved, until it has been."""
        self.over = False
        self._max_model_len = max_model_len
        self._mailbox = Mailbox(wakeups)
        self._outputs_before = len(request.token_ids) - request.prompt_len
        self._logprobs_per_token = 0 if request.sampling.logprobs is None else 1
        self._cached_tokens: int | None = None
        self._started = False
        self._emitted_before = 0
        self._wants_prompt_logprobs = request.sampling.prompt_logprobs is not None
        self._prompt_logprobs: list[PositionLogprobs | None] = []
        self._hashes: list[bytes] = []

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The prompt and everything emitted."""
        return (*self.request.token_ids, *self.emitted)

    @property
    def num_outputs(self) -> int:
        """Tokens after the prompt: the `output_index` that comes next."""
        return self._outputs_before + len(self.emitted)

    def hashes(self, block_size: int) -> list[bytes]:
        """Return the chained hashes of the full blocks of `token_ids`."""
        extend_hashes(self._hashes, self.token_ids, block_size, self.request.cache_salt)
        return self._hashes

    def begin_attempt(self, stream: DecodeStream, prefill: Member | None) -> Request:
        """Go on at `stream`; return the request as it is to be submitted there."""
        self.stream = stream
        self.prefill = prefill
        self.attempt += 1
        self.dispatches += 1
        self.recovery = None
        self._started = False
        self._emitted_before = len(self.emitted)
        self._prompt_logprobs = []
        sampling = self.request.sampling
        if not self._wants_prompt_logprobs:
            sampling = replace(sampling, prompt_logprobs=None)
        return replace(
            self.request,
            request_id=self.wire_id,
            token_ids=self.token_ids,
            attempt=self.attempt,
            sampling=sampling,
        )

    def is_current(self, stream: DecodeStream, attempt: int) -> bool:
        """Whether a message speaks of the attempt that runs now."""
        return self.stream is stream and self.attempt == attempt

    def accept(self, output: worker_pb2.SequenceOutput) -> Verdict:
        """Hand an output of the current attempt to the consumer if it begins where the last ended.

        Raises `TandemError`, with nothing handed on, if the output contradicts the request.
        """
        index, due = output.output_index, self.num_outputs
        if index != due:
            return "stale" if index < due else "gap"
        if prompt_logprobs := output.prompt_logprobs:
            self._prompt_logprobs.extend(_prompt_position(entry) for entry in prompt_logprobs)
        reason = finish_reason_from_proto(output.finish_reason)
        token_ids = tuple(output.token_ids)
        if token_ids or reason is not None:
            self._emit(output, token_ids, reason)
        return "accepted"

    def starts(self) -> bool:
        """Whether the first token of the current attempt is here. True once an attempt."""
        first = not self._started and len(self.emitted) > self._emitted_before
        self._started = self._started or first
        return first

    def completed_reason(self) -> FinishReason | None:
        """Return why the tokens emitted so far are the whole answer, None if they are not."""
        sampling = self.request.sampling
        if not self.emitted:
            return None
        if self.emitted[-1] in sampling.stop_token_ids and self.num_outputs >= sampling.min_tokens:
            return "stop"
        total = self.request.prompt_len + self.num_outputs
        if self.num_outputs >= sampling.max_tokens or total >= self._max_model_len:
            return "length"
        return None

    def complete(self, reason: FinishReason) -> None:
        """Tell the consumer that what it has is the whole answer."""
        stop_token_id = self.emitted[-1] if reason == "stop" else None
        self._mailbox.put(
            OutputEvent(
                token_ids=(),
                finish_reason=reason,
                stop_token_id=stop_token_id,
                cached_tokens=self._cached_tokens or 0,
            )
        )

    def fail(self, error: TandemError) -> None:
        """Raise `error` at the consumer, after the tokens that it has not read yet."""
        self._mailbox.put(error)

    def end(self) -> None:
        """Let a consumer that waits see the end: the request was closed."""
        self._mailbox.put(None)

    async def next_event(self) -> Item:
        """Return what comes next for the consumer."""
        return await self._mailbox.get()

    def _emit(
        self,
        output: worker_pb2.SequenceOutput,
        token_ids: tuple[int, ...],
        reason: FinishReason | None,
    ) -> None:
        logprobs = output.logprobs
        wanted = self._logprobs_per_token * len(token_ids)
        if len(logprobs) != wanted:
            raise TandemError(f"{len(logprobs)} logprobs came where {wanted} were due")
        has_first = output.HasField("first")
        if has_first and self._cached_tokens is None:
            self._cached_tokens = output.first.cached_tokens
        prompt_logprobs = None
        if self._wants_prompt_logprobs and token_ids:
            prompt_logprobs = self._take_prompt_logprobs()
        self.emitted.extend(token_ids)
        self._mailbox.put(
            OutputEvent(
                token_ids=token_ids,
                logprobs=tuple(map(position_logprobs_from_proto, logprobs)) if wanted else (),
                prompt_logprobs=prompt_logprobs,
                finish_reason=reason,
                stop_token_id=output.stop_token_id if reason == "stop" else None,
                cached_tokens=self._cached_tokens or 0,
                stages=_stages(output.first) if has_first else None,
                handover=_handover(output.handover) if output.HasField("handover") else None,
            )
        )

    def _take_prompt_logprobs(self) -> tuple[PositionLogprobs | None, ...]:
        """Return one entry per prompt token; a worker may leave out the first, which has none."""
        entries: Sequence[PositionLogprobs | None] = self._prompt_logprobs
        missing = self.request.prompt_len - len(entries)
        if missing not in (0, 1):
            raise TandemError(
                f"{len(entries)} prompt logprobs came for {self.request.prompt_len} prompt tokens"
            )
        self._wants_prompt_logprobs = False
        return (*[None] * missing, *entries)


def _prompt_position(entry: inference_pb2.PositionLogprobs) -> PositionLogprobs | None:
    return position_logprobs_from_proto(entry) if entry.HasField("chosen") else None


def _stages(first: worker_pb2.FirstTokenInfo) -> StageTimes:
    return StageTimes(
        queue_seconds=first.queue_seconds,
        prefill_seconds=first.prefill_seconds,
        prefill_worker=first.prefill_worker,
    )


def _handover(info: worker_pb2.HandoverInfo) -> HandoverTimes:
    return HandoverTimes(
        transfer_seconds=info.transfer_seconds,
        exposed_transfer_seconds=info.exposed_transfer_seconds,
        kv_bytes=info.kv_bytes,
    )
