"""Requests that a prefill worker decodes itself while the decode workers have no room for them.

Tokens go to the decode worker one by one, stamped with their position; it owns the request and
sends them on. Engine thread only. Invariant: with the grant the request leaves between two
iterations, so every token is sampled by exactly one worker, and its KV goes with it.
"""

from __future__ import annotations

from typing import Protocol

from tandem.core.request import SampledToken
from tandem.core.stopping import finish_reason
from tandem.prefill.legs import PrefillLeg
from tandem.v1 import worker_pb2
from tandem.wire import position_logprobs_to_proto
from tandem.worker.runtime import WorkerRuntime
from tandem.worker.transfers import LegTransfers


class LegOwner(Protocol):
    """Who knows the legs."""

    def forget(self, leg: PrefillLeg, outcome: str) -> None: ...


class KeptRequests:
    """What differs for a leg in phase `keeping`."""

    def __init__(self, runtime: WorkerRuntime, transfers: LegTransfers, owner: LegOwner) -> None:
        self._runtime = runtime
        self._transfers = transfers
        self._owner = owner

    def sampled(self, leg: PrefillLeg, sampled: SampledToken) -> bool:
        """Send a token; return whether it was the last."""
        sequence, spec = leg.sequence, self._runtime.engine.spec
        kept = worker_pb2.KeptToken(
            leg_id=leg.leg_id, position=sequence.num_tokens, token_id=sampled.token_id
        )
        if sampled.logprobs is not None:
            kept.logprobs.CopyFrom(position_logprobs_to_proto(sampled.logprobs))
        leg.peer.send(worker_pb2.PrefillToDecode(kept=kept))
        self._runtime.scheduler.append(sequence, sampled.token_id)
        self._runtime.count_lent(1)
        return finish_reason(sequence, spec.eos_token_ids, spec.max_model_len) is not None

    def granted(self, leg: PrefillLeg, grant: worker_pb2.Grant) -> None:
        """The decode worker has blocks: send the KV, and with a token sampled, the request too."""
        sequence = leg.sequence
        leg.held_tokens = grant.held_tokens
        if sequence.phase == "waiting":
            # Nothing is computed: from here on it is a leg like any other.
            leg.phase = "granted"
            sequence.remote = leg.held_tokens > 0
            return
        if self._runtime.scheduler.is_restoring(sequence):
            leg.phase = "granted"  # likewise, once what host memory has is back
            return
        computed = min(sequence.num_computed, grant.reserved_tokens)
        self._transfers.open_sends(leg)
        self._transfers.send_computed(leg, leg.chunks, leg.held_tokens, computed)
        leg.chunks += 1
        if sequence.num_tokens == len(sequence.request.token_ids):
            leg.phase = "computing"  # a prompt under way: the rest follows as it is computed
            return
        leg.peer.cut_leg(leg.leg_id, max(leg.held_tokens, computed))
        leg.peer.transfer.finish_sends(leg.leg_id)
        self._owner.forget(leg, "handed_over")
