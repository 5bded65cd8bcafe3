"""Hand-made scheduling cases: an engine without a model, and iterations as one line of text each.

`a5 b1` says that one iteration computed 5 tokens of `a` and 1 of `b`, in the order of the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tandem.core.config import SchedulerConfig
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import IterationPlan, Sequence
from tandem.kvcache.block_pool import BlockPool
from tandem.scheduler import Policy, Scheduler
from tandem.scheduler.costs import Work, work_of

BLOCK = 4


@dataclass
class Bench:
    """One worker without a model; sequences end at their max_tokens."""

    scheduler: Scheduler
    seconds: Callable[[Work], float] = lambda work: 1.0
    now: float = 0.0
    sequences: list[Sequence] = field(default_factory=list)

    def add(
        self,
        name: str,
        prompt: int,
        output: int = 1,
        *,
        remote: bool = False,
        **request: object,
    ) -> Sequence:
        """Queue a request that has arrived now."""
        arrival = len(self.sequences)
        tokens = tuple(range(1000 * arrival, 1000 * arrival + prompt))
        sampling = SamplingParams(max_tokens=output)
        made = Request(name, tokens, prompt, sampling, **request)  # type: ignore[arg-type]
        seq = Sequence(made, arrival, remote, arrived_at=self.now)
        self.scheduler.check_fits(made)
        self.scheduler.add(seq)
        self.sequences.append(seq)
        return seq

    def step(self) -> str:
        """Run one iteration and say what it was."""
        scheduler = self.scheduler
        plan = scheduler.schedule(self.now)
        work = work_of(plan.chunks)
        duration = self.seconds(work)
        self.now += duration
        samplers = [chunk.sequence for chunk in plan.chunks if chunk.samples]
        scheduler.advance(plan)
        if plan.chunks:
            scheduler.measured(work, duration)
        for seq in samplers:
            scheduler.append(seq, 7)
            if seq.num_tokens >= seq.request.max_len:
                scheduler.finish(seq, "length")
        for seq in plan.preempted:
            scheduler.add(seq)
        scheduler.pool.check_integrity()
        return describe(plan)

    def steps(self, count: int) -> list[str]:
        """Run iterations."""
        return [self.step() for _ in range(count)]

    def finish_prompts(self) -> None:
        """Run until nobody waits and every prompt is computed."""
        running = self.scheduler.running
        while self.scheduler.num_waiting or any(seq.num_uncomputed > 1 for seq in running):
            self.step()

    def finish(self, limit: int = 1000) -> list[str]:
        """Run until everything has ended."""
        lines = []
        while self.scheduler.num_waiting or self.scheduler.num_running:
            lines.append(self.step())
            assert len(lines) < limit, "no end in sight"
        return lines


def make_bench(policy: str | Policy, num_blocks: int = 256, **settings: object) -> Bench:
    """A worker with a policy, a budget of 16 tokens in chunks of 8, and iterations of 1 second."""
    defaults: dict[str, object] = {"max_batch_tokens": 16, "chunk_size": 8, "max_running": 8}
    own = policy if isinstance(policy, Policy) else None
    if own is None:
        defaults["policy"] = policy
    config = SchedulerConfig.model_validate({**defaults, **settings})
    pool = BlockPool(num_blocks, BLOCK, prefix_cache=False)
    return Bench(Scheduler(config, pool, max_model_len=900, policy=own))


def describe(plan: IterationPlan) -> str:
    """An iteration in one line."""
    return " ".join(f"{c.sequence.request.request_id}{c.length}" for c in plan.chunks)
