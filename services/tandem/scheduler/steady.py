"""Many decode steps of one unchanged batch at once, with the state that single steps would leave.

While nobody waits and every running sequence decodes, most policies make the same iteration again
and again. `steady_steps` says how often that is certain, and `repeat` does it. The simulator leaps
over such stretches; a worker, which has to compute them, has no use for it.
"""

from __future__ import annotations

from tandem.core.sequence import IterationPlan, ScheduledChunk
from tandem.scheduler.policies import Policy
from tandem.scheduler.scheduler import Scheduler


def steady_steps(scheduler: Scheduler, plan: IterationPlan, most: int) -> int:
    """Return how often the iteration of `plan`, which is under way, is followed by an equal one, up
    to `most`, as long as nobody touches the scheduler.

    In all of them but the last no sequence reaches its `max_len`; nobody is preempted for them.
    """
    if scheduler.waiting or len(plan.chunks) != len(scheduler.running):
        return 0
    if not plan.chunks or not is_indifferent(scheduler.policy):
        return 0
    steps = most
    for sequence, _, length, samples, _ in plan.chunks:
        if length != 1 or not samples or not sequence.num_output_tokens:
            return 0  # a first token is news, which a leap would bring late
        left = sequence.max_len - len(sequence.token_ids) - 1
        if left < steps:
            steps = left
    num_free = scheduler.pool.num_free
    if len(plan.chunks) * (steps // scheduler.pool.block_size + 1) <= num_free:
        return max(steps, 0)  # however they lie, there are blocks enough
    while steps > 0 and _blocks_missing(scheduler, plan, steps) > num_free:
        steps //= 2
    return max(steps, 0)


def repeat(scheduler: Scheduler, plan: IterationPlan, steps: int, token_id: int) -> IterationPlan:
    """End the iteration of `plan` and begin the next, so often; each draws `token_id` for everyone.

    The same as `advance`, `append` and `schedule`, so often; `steady_steps` must have allowed it.
    Returns the iteration that is under way then.
    """
    pool, size = scheduler.pool, scheduler.pool.block_size
    filled: list[tuple[int, int, int]] = []
    drawn = [token_id] * steps
    chunks = []
    for place, (sequence, start, *_) in enumerate(plan.chunks):
        end = start + steps
        missing = end // size + 1 - len(sequence.block_table)
        if missing > 0:
            sequence.block_table += pool.allocate(missing, sequence.holder)
        sequence.num_computed = end
        sequence.token_ids += drawn
        chunks.append(ScheduledChunk(sequence, end, 1))
        if pool.prefix_cache:
            blocks = range(start // size, end // size)
            filled += [((block + 1) * size - start, place, block) for block in blocks]
    for _, place, block in sorted(filled):  # in the order in which single steps fill them
        scheduler.holdings.publish(plan.chunks[place].sequence, block * size, (block + 1) * size)
    return IterationPlan(tuple(chunks))


def _blocks_missing(scheduler: Scheduler, plan: IterationPlan, steps: int) -> int:
    size = scheduler.pool.block_size
    return sum(
        max(0, -(-(chunk.end + steps) // size) - len(chunk.sequence.block_table))
        for chunk in plan.chunks
    )


def is_indifferent(policy: Policy) -> bool:
    """Whether the policy neither counts iterations nor learns from what they take."""
    kind = type(policy)
    return kind.planned is Policy.planned and kind.measured is Policy.measured
