"""A recorded run through the scheduler again: as it was, step by step, or with another policy in virtual time.

The scheduler, its policies and its prefix cache are those that served. The tokens are stand-ins, equal where the recorded
fingerprints were, so that what was shared is shared again. It does not know what the tokens said, and of the machine only how long
its iterations took.
"""

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from math import inf
from statistics import median
from typing import Any

from stallfree import policies
from stallfree.core.plan import Plan, StepResult
from stallfree.core.policy import Policy, Setup
from stallfree.core.record import Run, StepRecord
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.core.slo import Slo
from stallfree.perf.fitted import Errors, Fitted
from stallfree.sim.cluster import serve
from stallfree.sim.replica import Replica, script
from stallfree.sim.routers import round_robin
from stallfree.workload.prompt import Prompt


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a replay first leaves the record: `field` of step `step`."""

    step: int
    field: str
    recorded: object
    replayed: object

    def __str__(self) -> str:
        return f"step {self.step} differs in {self.field}: recorded {self.recorded!r}, replayed {self.replayed!r}"


def policy_of(run: Run) -> Policy:
    """The policy as it was when the run began. Raises ValueError if there is no such policy here, or it takes other options."""
    return _policy(run.policy, run.targets, dict(run.options or {}), run.cost)


def replayed(run: Run, records: Sequence[StepRecord]) -> Iterator[StepRecord]:
    """The records that the scheduler writes now, given the same arrivals, ends and times; it stops where there is no work to do.
    Raises ValueError for a run with requests whose prompts other engines computed.

    In a pipeline it is exact only without a prefix cache: of an attempt to plan that found no KV there is no record, but it has
    made the prefix that it looked up a recently used one. Where iterations overlap there are no such attempts.
    """
    scheduler = Scheduler(policy_of(run), run.capacity, run.limits, reuse=run.reuse)
    late = {id for r in records for id in _ended_by_text(r)}
    served = _served(run, records, {f.id for r in records for f in r.finished if f.reason == "stop"} - late)
    outstanding: deque[Plan] = deque()
    planned = 0
    for r in records:
        arrived = [served[a.id].request for a in r.arrived]
        for request in arrived:
            scheduler.submit(request)
        ended = [scheduler.abort(f.id) for f in r.finished if f.reason == "abort"]
        while len(outstanding) < run.capacity.depth and planned < len(records) and records[planned].t_plan <= r.t_end:
            plan = scheduler.schedule(records[planned].t_plan)
            if not plan.work:
                break
            planned += 1
            outstanding.append(plan)
        if not outstanding:
            return
        plan = outstanding.popleft()
        failed = {f.id: "as recorded" for f in r.finished if f.reason == "error"} if r.error is None else {}
        tokens, seconds = _sampled(plan, served), r.t_end - r.t_start
        result = StepResult(plan.step, tokens, seconds, error=r.error, failed=failed, bubble_s=r.bubble_s)
        done, dropped = scheduler.complete(plan, result, r.t_end)
        ended += done
        ended += [scheduler.abort(f.id, f.reason) for f in r.finished if f.id in late]
        finished = [request for request in ended if request is not None]
        times = (r.t_plan, r.t_start, r.t_end)
        yield StepRecord.of(plan, result, scheduler.ledger, times, arrived, finished, dropped=dropped)


def difference(run: Run, records: Sequence[StepRecord]) -> Difference | None:
    """The first step in which the scheduler would now decide otherwise than recorded; None if it decides the same throughout."""
    count = 0
    for recorded, now in zip(records, replayed(run, records), strict=False):
        count += 1
        plain = replace(
            recorded,
            arrived=[a._replace(blocks=()) for a in recorded.arrived],
            finished=[f._replace(blocks=()) for f in recorded.finished],
        )
        for f in fields(StepRecord):
            if getattr(plain, f.name) != getattr(now, f.name):
                return Difference(recorded.step, f.name, getattr(plain, f.name), getattr(now, f.name))
    if count < len(records):
        return Difference(records[count].step, "work", records[count].work, [])
    return None


class Machine:
    """How long iterations take: a model fitted to the record, times what the record's iteration at that moment took of its own
    prediction. So a disturbance hits whatever runs then. `errors`: of the model alone; `between_s`: from an iteration's end to
    the next one's planning, of which the record has the median. With `overlap` an iteration takes the time since the one before.
    """

    def __init__(self, records: Sequence[StepRecord], *, overlap: bool = False):
        ends = [-inf, *(r.t_end for r in records)]
        times = [r.t_end - (max(r.t_plan, end) if overlap else r.t_plan) for r, end in zip(records, ends, strict=False)]
        samples = [(_shape(r), time) for r, time in zip(records, times, strict=True) if r.error is None and time > 0]
        if not samples:
            raise ValueError("no recorded iteration took time, so there is nothing to tell how long others would take")
        self.model = Fitted.fit(samples)
        self.errors: Errors = self.model.errors(samples)
        self._since = [r.t_plan for r in records]
        self._slowness = [time / self.model.seconds(_shape(r)) for r, time in zip(records, times, strict=True)]
        busy = [b.t_plan - a.t_end for a, b in pairwise(records) if a.num_running + a.num_waiting]
        self.between_s = max(0.0, median(busy)) if busy else 0.0

    def slowness(self, moment: float) -> float:
        return self._slowness[max(0, bisect_right(self._since, moment) - 1)]


def what_if(
    run: Run, records: Sequence[StepRecord], machine: Machine, policy: str, slo: Slo | None, options: Mapping[str, Any]
) -> list[StepRecord]:
    """The recorded arrivals served by another policy, on `machine` in virtual time. Each request ends after as many tokens as it
    got in the record, and one that was aborted, at the same moment.

    A policy with a cost model begins with the recorded one, or without it with the machine's. Raises ValueError for a policy or
    options that there are not, or for an SLO that cannot be met.
    """
    state = run.cost if run.cost is not None else machine.model.state()
    # One plan at a time: stages of a pipeline have no times of their own in a record.
    scheduler = Scheduler(
        _policy(policy, slo, options, state), replace(run.capacity, depth=1, overlap=False), run.limits, reuse=run.reuse
    )
    lost = {f.id: r.t_plan for r in records for f in r.finished if f.reason in ("abort", "error")}
    served = _served(run, records, {a.id for r in records for a in r.arrived} - lost.keys())
    made: list[StepRecord] = []
    replica = Replica(
        scheduler,
        machine.model,
        record=made.append,
        begin=records[0].t_plan,
        between_s=machine.between_s,
        slowness=machine.slowness,
    )
    coming = [script(one.request, one.answer) for one in served.values()]
    coming.sort(key=lambda request: request.arrival)
    serve(coming, [replica], round_robin(), sorted((at, id) for id, at in lost.items()))
    return made


def _policy(name: str, slo: Slo | None, options: Mapping[str, Any], cost: Mapping[str, Any] | None) -> Policy:
    return policies.load(name, Setup(None if cost is None else Fitted.from_state(cost), slo), **options)


STOP = -1
"""The token that ends a request; no fingerprint is negative, and a request's own token is below it."""


@dataclass(frozen=True, slots=True)
class _Served:
    """A request, its tokens, and after how many of output STOP comes (0: never)."""

    request: Request
    tokens: Prompt
    stop_after: int

    @property
    def answer(self) -> list[int]:
        length = len(self.tokens)
        found = [self.tokens.at(length + number) for number in range(self.stop_after or self.request.max_tokens)]
        return [*found[:-1], STOP] if self.stop_after else found


def _served(run: Run, records: Sequence[StepRecord], stopped: Set[str]) -> dict[str, _Served]:
    """Every request that arrived, new, by id; those `stopped` end after as many tokens as they got, or before by `max_tokens`."""
    for r in records:
        if r.delivered or r.recalled:
            raise ValueError(
                f"step {r.step} has requests that were transferred by another engine, and when they came does not follow from this "
                "record; replay the run of an engine with --role both"
            )
    size = run.capacity.block_size
    lengths = Counter(id for r in records for id in r.emitted)
    behind = {f.id: f.blocks for r in records for f in r.finished}
    found: dict[str, _Served] = {}
    extra = dict(pair for r in records for pair in r.extra_rows)
    for number, a in enumerate((a for r in records for a in r.arrived), 2):
        if run.reuse and len(a.blocks) != a.prompt_tokens // size:
            raise ValueError(
                f"request {a.id} has no fingerprints of its prompt, so what it shared is not known; record the run again"
            )
        tokens = Prompt(a.prompt_tokens, (*a.blocks, *behind.get(a.id, ())), -number, size)
        slo = Slo.parse(a.slo) if a.slo else None
        request = Request(
            a.id,
            tokens,
            a.max_tokens,
            stop_ids=frozenset({STOP}),
            arrival=a.arrival,
            priority=a.priority,
            slo=slo,
            extra_rows=extra.get(a.id, 0),
        )
        found[a.id] = _Served(request, tokens, max(1, lengths[a.id]) if a.id in stopped else 0)
    return found


def _sampled(plan: Plan, served: Mapping[str, _Served]) -> dict[str, tuple[int]]:
    found: dict[str, tuple[int]] = {}
    for work in plan.work:
        if work.samples:
            one, position = served[work.id], work.start + work.count
            last = position - len(one.tokens) + 1 == one.stop_after
            found[work.id] = (STOP if last else one.tokens.at(position),)
    return found


def _ended_by_text(r: StepRecord) -> list[str]:
    """Whose end the engine found in the text, after the iteration was complete: those out of turn in the order of its work."""
    order = {id: number for number, (id, _, _) in enumerate(r.work)}
    ids = [f.id for f in r.finished if f.reason != "abort"]
    for number in range(1, len(ids)):
        if order[ids[number]] < order[ids[number - 1]]:
            return ids[number:]
    return []


def _shape(r: StepRecord) -> list[tuple[int, int]]:
    return [(start, count) for _, start, count in r.work]
