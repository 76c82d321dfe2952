"""A run in virtual time: the scheduler driven by a clock that jumps, a cost that is a formula and tokens that are counted."""

from collections import deque
from collections.abc import Iterable

from stallfree.core.plan import Capacity, Plan, StepResult
from stallfree.core.policy import Policy
from stallfree.core.record import StepRecord
from stallfree.core.request import Request
from stallfree.core.scheduler import Limits, Scheduler


def seconds(plan: Plan) -> float:
    """Milliseconds-scale cost: a constant, a price per token, a smaller one per token of context."""
    return 0.010 + sum(0.0004 * w.count + 0.000002 * w.start for w in plan.work)


def answer(plan: Plan) -> StepResult:
    """The token at position p of any request is p: what a request gets does not depend on how it was batched."""
    return StepResult(plan.step, {w.id: (w.start + w.count,) for w in plan.work if w.samples}, seconds(plan))


def run(policy: Policy, requests: Iterable[Request], capacity: Capacity, limits: Limits | None = None) -> list[StepRecord]:
    """Serve `requests` (in order of arrival) to their end; the scheduler is checked after every step."""
    scheduler = Scheduler(policy, capacity, limits)
    coming, now, busy_until = deque(requests), 0.0, 0.0
    out: deque[tuple[Plan, float, float]] = deque()
    arrived: list[Request] = []
    records: list[StepRecord] = []
    while coming or scheduler.requests:
        while coming and coming[0].arrival <= now:
            arrived.append(coming[0])
            scheduler.submit(coming.popleft())
        if len(out) < capacity.depth and (plan := scheduler.schedule(now)).work:
            start = max(now, busy_until)
            busy_until = start + seconds(plan) / capacity.depth
            out.append((plan, start, start + seconds(plan)))
            continue
        if out:
            plan, start, end = out.popleft()
            now = max(now, end)
            result = answer(plan)
            done = scheduler.complete(plan, result, now)
            records.append(StepRecord.of(plan, result, scheduler, (plan.now, start, end), arrived, done))
            arrived = []
        else:
            if not coming:
                raise RuntimeError(f"nothing runs, nothing comes, and {len(scheduler.requests)} requests wait at {now}")
            now = coming[0].arrival
        scheduler.check()
    return records
