"""Every request in flight, and what becomes of it when something happens to its worker.

::

    open --> running --finish--> over
      |       |  ^
      |  lost |  | dispatched: prompt + emitted tokens, attempt + 1
      |       v  |
      +----> parked --no worker in time--> over (UnavailableError)

No handler awaits. Invariant: a request is in `_flights` until it is over, and `_end` is the only
way out: it gives back router load and stream, once.
"""

from __future__ import annotations

import itertools

import structlog

from tandem.core.config import GatewayConfig
from tandem.core.errors import OverloadedError, TandemError, UnavailableError
from tandem.core.request import Request
from tandem.gateway.dispatch.flight import Flight
from tandem.gateway.dispatch.mailbox import Wakeups
from tandem.gateway.dispatch.parking import Parking
from tandem.gateway.dispatch.routing import Routing, prefill_target
from tandem.gateway.dispatch.stream import DecodeStream
from tandem.gateway.interfaces import DispatchObserver
from tandem.tracing.buffer import TraceBuffer
from tandem.v1 import worker_pb2
from tandem.wire import failed_to_error, request_to_submit

log = structlog.get_logger(__name__)

REJECTION_BACKOFF_SECONDS = 0.1
"""Pause before a worker that rejected a request is asked again; doubles with each attempt."""


class Traffic:
    """All flights of one gateway."""

    def __init__(
        self,
        config: GatewayConfig,
        routing: Routing,
        observer: DispatchObserver,
        gateway_id: str,
        trace: TraceBuffer,
    ) -> None:
        self._config = config
        self._routing = routing
        self._observer = observer
        self._gateway_id = gateway_id
        self._trace = trace
        self._flights: dict[str, Flight] = {}
        self._parking = Parking(config.no_worker_timeout, self._retry_parked, self._give_up)
        self._count = itertools.count()
        self._wakeups = Wakeups()

    def __len__(self) -> int:
        return len(self._flights)

    # ---- what the consumer does

    def open(self, request: Request) -> Flight:
        """Dispatch a new request, or keep it until a decode worker is ready.

        Raises `OverloadedError` when every worker is full or too many wait for one already, and
        `UnavailableError` before the model is known; then nothing is held.
        """
        model = self._routing.membership.model
        if model is None:
            raise UnavailableError("the cluster is not known yet")
        wire_id = f"{request.request_id}~{self._gateway_id}.{next(self._count)}"
        flight = Flight(request, wire_id, model.max_model_len, self._wakeups)
        try:
            self._dispatch(flight)
        except UnavailableError:
            self._wait_for_a_worker(flight)
        self._flights[wire_id] = flight
        return flight

    def cancel(self, flight: Flight) -> None:
        """The consumer is gone: free everything everywhere. Idempotent."""
        if not flight.over:
            self._send_cancel(flight)
            flight.end()
            self._end(flight)

    def fail_all(self, error: TandemError) -> None:
        """End every request with `error`."""
        for flight in list(self._flights.values()):
            self._send_cancel(flight)
            self._fail(flight, error)

    # ---- what a decode worker says

    def outputs(self, stream: DecodeStream, batch: worker_pb2.OutputBatch) -> None:
        """Hand on what one iteration made."""
        for output in batch.outputs:
            flight = self._current(stream, output.request_id, output.attempt)
            if flight is not None:
                self._output(flight, output)

    def need_prefill(self, stream: DecodeStream, message: worker_pb2.NeedPrefill) -> None:
        """Name another prefill worker."""
        flight = self._current(stream, message.request_id, message.attempt)
        if flight is None:
            return
        flight.prefill = self._routing.reassign_prefill(flight, message.failed_worker)
        if message.failed_worker:
            self._observer.recovered("prefill_reassigned")
        log.warning(
            "request prefill reassigned",
            **_names(flight),
            failed=message.failed_worker,
            reason=message.reason,
            prefill=flight.prefill.name if flight.prefill else "local",
        )
        reassign = worker_pb2.Reassign(
            request_id=flight.wire_id,
            attempt=flight.attempt,
            prefill=prefill_target(flight.prefill),
        )
        stream.send(worker_pb2.GatewayMessage(reassign=reassign))

    def failed(self, stream: DecodeStream, message: worker_pb2.RequestFailed) -> None:
        """Try another worker if that may help, else tell the consumer."""
        flight = self._current(stream, message.request_id, message.attempt)
        if flight is None:
            return
        error = failed_to_error(message)
        if not message.retriable:
            self._fail(flight, error)
            return
        elsewhere = self._routing.has_decode_besides({*flight.avoid, stream.member.name})
        if not elsewhere and isinstance(error, OverloadedError) and not flight.emitted:
            self._fail(flight, error)
            return
        log.warning("request rejected", **_names(flight), detail=error.message)
        self._recover(flight, "rejected", error, elsewhere_only=True)

    def lost(self, stream: DecodeStream, cause: str, detail: str) -> None:
        """Move every request of a stream that is over."""
        error = UnavailableError(f"decode worker {stream.member.name} was lost: {detail}")
        for flight in [flight for flight in self._flights.values() if flight.stream is stream]:
            self._recover(flight, cause, error)

    def capacity_changed(self) -> None:
        """A worker came back: serve those that wait for one."""
        self._retry_parked()

    # ---- inside

    def _wait_for_a_worker(self, flight: Flight) -> None:
        limit = self._config.router.max_in_flight
        if len(self._parking) >= limit:
            raise OverloadedError(
                f"no decode worker is ready and {limit} requests wait for one already"
            )
        self._parking.add(flight, 0.0)

    def _current(self, stream: DecodeStream, wire_id: str, attempt: int) -> Flight | None:
        """Return the flight that a message speaks of, or count the message as stale."""
        flight = self._flights.get(wire_id)
        if flight is None:
            self._observer.stale_refused("request")
            return None
        if not flight.is_current(stream, attempt):
            self._observer.stale_refused("attempt")
            return None
        return flight

    def _output(self, flight: Flight, output: worker_pb2.SequenceOutput) -> None:
        try:
            verdict = flight.accept(output)
        except TandemError as error:
            self._abandon_attempt(flight, "invalid_output", error)
            return
        if verdict == "stale":
            self._observer.stale_refused("output_index")
        elif verdict == "gap":
            detail = f"output {output.output_index} came where {flight.num_outputs} was due"
            self._abandon_attempt(flight, "output_gap", TandemError(detail))
        else:
            if flight.starts():
                self._routing.first_token(flight, is_local=not output.first.prefill_worker)
            if output.finish_reason:
                self._end(flight)

    def _abandon_attempt(self, flight: Flight, cause: str, error: TandemError) -> None:
        log.warning("request bad output", **_names(flight), cause=cause, detail=error.message)
        self._send_cancel(flight)
        self._recover(flight, cause, error)

    def _recover(
        self, flight: Flight, cause: str, error: TandemError, *, elsewhere_only: bool = False
    ) -> None:
        """Go on elsewhere, wait for a worker, or end: complete already, or tried often enough."""
        if flight.stream is not None:
            flight.avoid.add(flight.stream.member.name)
        self._leave_worker(flight)
        reason = flight.completed_reason()
        if reason is not None:
            self._observer.recovered(cause)
            flight.complete(reason)
            self._end(flight)
        elif flight.dispatches >= self._config.max_attempts:
            self._fail(flight, error)
        else:
            flight.recovery = cause
            if not self._try_dispatch(flight, elsewhere_only=elsewhere_only):
                backoff = REJECTION_BACKOFF_SECONDS * 2.0 ** min(flight.dispatches - 1, 5)
                self._parking.add(flight, backoff if elsewhere_only else 0.0)
                log.warning("request parked", **_names(flight), cause=cause)

    def _try_dispatch(self, flight: Flight, *, elsewhere_only: bool = False) -> bool:
        try:
            self._dispatch(flight, elsewhere_only=elsewhere_only)
        except (UnavailableError, OverloadedError):
            return False
        return True

    def _dispatch(self, flight: Flight, *, elsewhere_only: bool = False) -> None:
        route = self._routing.assign(flight, avoid_strictly=elsewhere_only)
        self._trace.stage(flight.wire_id, "routed")
        cause = flight.recovery
        request = flight.begin_attempt(route.stream, route.prefill)
        route.stream.attach()
        try:
            submit = request_to_submit(request, prefill_target(route.prefill))
        except BaseException:  # a value that no field can hold: not dispatched, so nothing is held
            self._leave_worker(flight)
            raise
        route.stream.send(worker_pb2.GatewayMessage(submit=submit))
        self._trace.stage(flight.wire_id, "submitted")
        if cause is not None:
            self._observer.recovered(cause)
            log.info("request moved", **_names(flight), cause=cause, emitted=len(flight.emitted))

    def _retry_parked(self) -> None:
        for flight in self._parking.due():
            if not self._try_dispatch(flight):
                return
            self._parking.remove(flight)

    def _give_up(self, flight: Flight) -> None:
        waited = self._config.no_worker_timeout
        self._fail(flight, UnavailableError(f"no decode worker was ready within {waited:g} s"))

    def _fail(self, flight: Flight, error: TandemError) -> None:
        log.warning("request failed", **_names(flight), error=error.message)
        flight.fail(error)
        self._end(flight)

    def _end(self, flight: Flight) -> None:
        if flight.over:
            return
        flight.over = True
        del self._flights[flight.wire_id]
        self._parking.remove(flight)
        self._leave_worker(flight)
        self._retry_parked()

    def _leave_worker(self, flight: Flight) -> None:
        stream, flight.stream, flight.prefill = flight.stream, None, None
        if stream is not None:
            self._routing.release(flight)
            stream.detach()

    def _send_cancel(self, flight: Flight) -> None:
        if flight.stream is not None:
            cancel = worker_pb2.Cancel(request_id=flight.wire_id, attempt=flight.attempt)
            flight.stream.send(worker_pb2.GatewayMessage(cancel=cancel))


def _names(flight: Flight) -> dict[str, object]:
    return {
        "request_id": flight.wire_id,
        "attempt": flight.attempt,
        "worker": flight.stream.member.name if flight.stream else None,
    }
