"""Fair share: tenants get equal service, or service by weight, whatever they ask for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush

from tandem.core.config import SchedulerConfig
from tandem.core.pairs import parse_pairs
from tandem.core.sequence import IterationPlan, Sequence
from tandem.scheduler.policies.base import Policy, Steps, Task, View, stall_free

OUTPUT_COST = 2.0
"""What a decode step weighs against a prompt token, as in the paper."""
_MOST_COUNTERS = 4096


class FairShare(Policy):
    """Optimises fairness between tenants: a virtual token counter for each (VTC, OSDI 2024), and
    the next place goes to the tenant with the smallest.

    Work-conserving: a tenant alone gets everything. One that was idle starts level with those that
    wait, so idleness is not saved up. Costs: a tenant's requests are served in turn, not the
    cheapest first. Bound: the service of two tenants that both wait differs by no more than
    2 max(longest prompt, `OUTPUT_COST` * tokens that run at once), each divided by its weight.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._chunk_size = config.chunk_size
        self._weights = parse_pairs(config.tenant_weights)
        self._counters: dict[str, float] = {}
        self._level = 0.0
        """The counter of whoever was served last: where one starts when nobody waits."""

    def service(self, tenant: str) -> float:
        """Return a tenant's counter: its weighted service, lifted over its idle times."""
        return self._counters.get(tenant, self._level)

    def arrived(self, seq: Sequence, waiting: Iterable[Sequence]) -> None:
        tenant = seq.request.tenant
        tenants = {other.request.tenant for other in waiting}
        if tenant in tenants:
            return
        lift = min(map(self.service, tenants)) if tenants else self._level
        self._counters[tenant] = max(self.service(tenant), lift)
        if len(self._counters) > _MOST_COUNTERS:
            self._forget_idle({*tenants, tenant}, lift)

    def line(self, waiting: Iterable[Sequence], now: float) -> Iterator[Sequence]:
        """The first request of the least served tenant, as if those before it had been served."""
        queues: dict[str, deque[Sequence]] = {}
        for seq in waiting:
            queues.setdefault(seq.request.tenant, deque()).append(seq)
        heap = [(self.service(tenant), tenant) for tenant in queues]
        heapify(heap)
        while heap:
            counter, tenant = heappop(heap)
            seq = queues[tenant].popleft()
            yield seq
            if queues[tenant]:
                heappush(heap, (counter + self._cost(tenant, seq.num_uncomputed), tenant))

    def tasks(self, view: View) -> Iterable[Task | Steps]:
        prompts, waiting = self.line(view.prompts, view.now), self.line(view.waiting, view.now)
        return stall_free(view, prompts, waiting, self._chunk_size)

    def planned(self, plan: IterationPlan) -> None:
        for seq in plan.admitted:
            if seq.num_output_tokens == 0:  # what preemption makes us compute again is not service
                self._charge(seq, seq.num_tokens - seq.num_cached)
        for chunk in plan.chunks:
            if chunk.sequence.num_output_tokens:
                self._charge(chunk.sequence, OUTPUT_COST if chunk.length == 1 else 0)

    def _charge(self, seq: Sequence, tokens: float) -> None:
        tenant = seq.request.tenant
        self._level = self._counters[tenant] = self.service(tenant) + self._cost(tenant, tokens)

    def _cost(self, tenant: str, tokens: float) -> float:
        return tokens / self._weights.get(tenant, 1.0)

    def _forget_idle(self, tenants: set[str], lift: float) -> None:
        """Drop counters that would be lifted to the level of the others on their return anyway."""
        self._counters = {
            tenant: counter
            for tenant, counter in self._counters.items()
            if counter > lift or tenant in tenants
        }
