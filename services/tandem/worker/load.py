"""What a worker says of its load, to and from protobuf messages."""

from __future__ import annotations

import math

from tandem.router.lending import PromptWork, WorkerLoad
from tandem.scheduler.costs import IterationCosts, Work
from tandem.v1 import worker_pb2


def load_to_proto(load: WorkerLoad, *, is_measured: bool) -> worker_pb2.WorkerLoad:
    """Return the message; without its costs while they are not `is_measured`."""
    costs = worker_pb2.IterationCosts(**load.costs._asdict()) if is_measured else None
    longest = 0.0 if math.isinf(load.longest_iteration) else load.longest_iteration
    return worker_pb2.WorkerLoad(
        costs=costs,
        budget=load.budget,
        decodes=load.running.decodes,
        context=load.running.context,
        queued_tokens=load.queued.tokens,
        queued_attended=load.queued.attended,
        free_blocks=max(0, load.free_blocks),
        longest_iteration=longest,
    )


def load_from_proto(message: worker_pb2.WorkerLoad, credit: float) -> WorkerLoad:
    """Return the load; `credit` is the time in seconds since its sender made progress."""
    costs = message.costs
    return WorkerLoad(
        costs=IterationCosts(
            costs.fixed, costs.prompt_token, costs.decode, costs.context, costs.attended
        ),
        budget=message.budget,
        running=Work(decodes=message.decodes, context=message.context),
        longest_iteration=message.longest_iteration or math.inf,
        queued=PromptWork(message.queued_tokens, message.queued_attended),
        credit=credit,
        free_blocks=message.free_blocks,
    )
