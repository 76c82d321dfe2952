"""A run in virtual time: the simulator with a simple formula as its cost, and counted tokens."""

from collections.abc import Iterable

from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity, Plan, Shape, StepResult
from stallfree.core.policy import Policy
from stallfree.core.record import StepRecord
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.sim.cluster import serve
from stallfree.sim.replica import LEAP, Replica, script
from stallfree.sim.routers import round_robin


class Cost:
    """Milliseconds-scale: a constant, a price per token, a smaller one per token of context."""

    def seconds(self, shape: Shape) -> float:
        return 0.010 + sum(0.0004 * count + 0.000002 * start for start, count in shape)


def answer(plan: Plan) -> StepResult:
    """The token at position p of any request is p: what a request gets does not depend on how it was batched."""
    tokens = {w.id: w.verified(range(w.start + w.count - len(w.drafts), w.start + w.count + 1)) for w in plan.work if w.samples}
    return StepResult(plan.step, tokens, Cost().seconds(plan.shape))


def run(
    policy: Policy, requests: Iterable[Request], capacity: Capacity, limits: Limits | None = None, *, leap: int = LEAP
) -> list[StepRecord]:
    """Serve `requests` (in order of arrival) to their end; the scheduler is checked after every step."""
    scheduler = Scheduler(policy, capacity, limits)
    records: list[StepRecord] = []

    def record(step: StepRecord) -> None:
        scheduler.ledger.check()
        records.append(step)

    scripts = (script(r, range(len(r.prompt), len(r.prompt) + r.max_tokens)) for r in requests)
    serve(scripts, [Replica(scheduler, Cost(), record=record, leap=leap)], round_robin())
    return records
