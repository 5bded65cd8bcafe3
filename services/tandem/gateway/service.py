"""The one place that both edges call: checks requests, runs them, says what came out in text.

Knows nothing of HTTP or of gRPC messages, and nothing of workers. Invariant: whenever a stream of
`generate` ends, by itself, by an error or because it was closed, the dispatcher's stream is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Literal

from tandem.core.errors import ModelNotFoundError, TandemError
from tandem.core.request import Request
from tandem.gateway.changes import Changes
from tandem.gateway.interfaces import Dispatcher
from tandem.gateway.metrics import GatewayMetrics
from tandem.gateway.model import ModelLoader, ServedModel
from tandem.gateway.output import OutputAssembler, TextEvent
from tandem.gateway.params import (
    SamplingOptions,
    check_account,
    check_prompt,
    check_salt,
    complete_sampling,
    resolve_priority,
)
from tandem.gateway.response_cache import ResponseCache, answer_key
from tandem.gateway.tenants import Tenants
from tandem.tracing.buffer import TraceBuffer

_INLINE_CHARACTERS = 8192
"""Longer texts are tokenized in a thread, so that they do not hold up the streams."""


class InferenceService:
    """What a gateway can do, for every edge alike."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        metrics: GatewayMetrics,
        trace: TraceBuffer | None = None,
        *,
        cache: ResponseCache | None = None,
        tenants: Tenants | None = None,
        priority_classes: Mapping[str, float] | None = None,
    ) -> None:
        """`priority_classes`: names that a request may give for its priority."""
        self._trace = trace or TraceBuffer("gateway")
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._cache = cache
        self._priority_classes = priority_classes or {}
        self.tenants = tenants or Tenants()
        self._loader = ModelLoader(dispatcher)
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to look out for the model. Needs a running event loop; returns at once."""
        await self._dispatcher.start()
        self._watch = asyncio.create_task(self._loader.watch(), name="model-watch")

    async def close(self) -> None:
        """End the dispatcher and with it every stream."""
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        await self._dispatcher.close()

    @property
    def has_cache(self) -> bool:
        """Whether answers are kept, and each says whether it was."""
        return self._cache is not None

    @property
    def changes(self) -> Changes:
        """Notified whenever `ready` may have changed."""
        return self._dispatcher.changes

    @property
    def ready(self) -> bool:
        """Whether a request would be served now."""
        return self._dispatcher.ready and self._loader.current is not None

    @property
    def why_not_ready(self) -> str:
        """The reason in words; empty when ready."""
        if self._loader.current is None:
            return self._loader.why_not
        return "" if self._dispatcher.ready else "no decode worker is ready"

    @property
    def served(self) -> ServedModel | None:
        """The model, once it is known and loaded."""
        return self._loader.current

    async def model(self, name: str | None) -> ServedModel:
        """Return the model that a request names; "" or None is the one that is served.

        Raises `ModelNotFoundError` for another name and `UnavailableError` while there is none.
        """
        model = await self._loader.get()
        if name and name != model.info.name:
            raise ModelNotFoundError(
                f"model {name!r} does not exist; this server has {model.info.name!r}",
                param="model",
                code="model_not_found",
            )
        return model

    async def encode(
        self, model: ServedModel, text: str, *, add_special_tokens: bool = True
    ) -> tuple[int, ...]:
        """Tokenize; off the event loop when the text is long."""
        encode = model.tokenizer.encode
        if len(text) <= _INLINE_CHARACTERS:
            return tuple(encode(text, add_special_tokens=add_special_tokens))
        return tuple(await asyncio.to_thread(encode, text, add_special_tokens=add_special_tokens))

    def prepare(
        self,
        model: ServedModel,
        token_ids: tuple[int, ...],
        options: SamplingOptions,
        *,
        prompt_field: str = "prompt",
        client_id: str = "",
        priority: int | str = 0,
        cache_salt: str = "",
        tenant: str = "",
        ttft_objective: float = 0.0,
        itl_objective: float = 0.0,
    ) -> Request:
        """Check everything about a request and fill in every default.

        Its id is unique even if the client's own is not. Raises `InvalidRequestError`.
        """
        check_prompt(token_ids, prompt_field, model.info)
        number = resolve_priority(priority, self._priority_classes)
        check_salt(cache_salt)
        check_account(tenant, ttft_objective, itl_objective)
        sampling = complete_sampling(options, len(token_ids), model.info, model.defaults)
        suffix = secrets.token_hex(8)
        request_id = f"{client_id}-{suffix}" if client_id else suffix
        self._trace.stage(request_id, "tokenized")
        return Request(
            request_id=request_id,
            token_ids=token_ids,
            prompt_len=len(token_ids),
            sampling=sampling,
            priority=number,
            cache_salt=cache_salt,
            tenant=tenant,
            ttft_objective=ttft_objective,
            itl_objective=itl_objective,
            reproducible=sampling.greedy or options.seed is not None,
        )

    def generate(
        self, model: ServedModel, request: Request, arrival: float
    ) -> AsyncGenerator[TextEvent, None]:
        """Run a prepared request; the last event has a finish reason and the usage.

        `arrival` is the `time.monotonic()` at which the request came in. Raises what the
        dispatcher raises.
        """
        if self._cache is None:
            return self._run(model, request, arrival)
        if not request.reproducible:
            return self._run(model, request, arrival, cache="miss")
        key = answer_key(model, request)
        return self._cache.stream(key, lambda: self._run(model, request, arrival))

    async def _run(
        self,
        model: ServedModel,
        request: Request,
        arrival: float,
        cache: Literal["miss"] | None = None,
    ) -> AsyncGenerator[TextEvent, None]:
        assembler = OutputAssembler(model.tokenizer, request.sampling, request.prompt_len)
        self._trace.stage(request.request_id, "received", arrival)
        first = last = 0.0
        async with aclosing(self._dispatcher.generate(request)) as outputs:
            async for output in outputs:
                now = time.monotonic()
                if output.stages is not None:
                    self._metrics.stages(output.stages)
                if output.handover is not None:
                    self._metrics.handover(output.handover)
                if first:
                    self._metrics.next_tokens(now - last)
                else:
                    first = now
                    self._trace.stage(request.request_id, "client_first", now)
                    self._metrics.first_token(now - arrival)
                last = now
                event = assembler.feed(output)
                if cache is not None:
                    event, cache = event._replace(cache=cache), None
                if event.usage is not None:
                    self._trace.stage(request.request_id, "client_last", now)
                    self._metrics.finished(
                        prompt_tokens=event.usage.prompt_tokens,
                        completion_tokens=event.usage.completion_tokens,
                        cached_tokens=event.usage.cached_tokens,
                        end_to_end_seconds=now - arrival,
                        decode_seconds=now - first,
                    )
                    await outputs.aclose()
                yield event
                if event.usage is not None:
                    return
        raise TandemError("the stream ended without a finish reason")
