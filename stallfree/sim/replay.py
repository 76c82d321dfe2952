"""A recorded run through the scheduler again: as it was, step by step, or with another policy in virtual time.

The scheduler, its policies and its prefix cache are those of the live engine. The tokens are stand-ins, equal where the recorded
fingerprints are, so that the same prefixes are shared. It knows no real tokens, and of the machine only how long iterations took.
"""

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from math import inf
from statistics import median
from types import MappingProxyType
from typing import Any

from stallfree import policies
from stallfree.core.draft import Draft
from stallfree.core.plan import Plan, StepResult
from stallfree.core.policy import Policy, Setup
from stallfree.core.record import Loaded, Run, StepRecord
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.core.slo import Slo
from stallfree.core.tier import Tier
from stallfree.elastic.policies import POLICIES
from stallfree.perf.fitted import Errors, Fitted
from stallfree.sim.cluster import serve
from stallfree.sim.replica import Replica, script
from stallfree.sim.routers import round_robin
from stallfree.workload.prompt import Prompt


@dataclass(frozen=True, slots=True)
class Difference:
    """The first difference between replay and record: in `field` of step `step`."""

    step: int
    field: str
    recorded: object
    replayed: object

    def __str__(self) -> str:
        return f"step {self.step} differs in {self.field}: recorded {self.recorded!r}, replayed {self.replayed!r}"


def policy_of(run: Run) -> Policy:
    """The policy as it was when the run began. Raises ValueError if there is no such policy, or if it takes other options."""
    return _policy(run.policy, run.targets, dict(run.options or {}), run.cost)


def replayed(run: Run, records: Sequence[StepRecord]) -> Iterator[StepRecord]:
    """The records that the scheduler writes now for the same arrivals, ends and times. It stops if the scheduler plans no work.
    Raises ValueError for a run with requests whose prompts other engines computed, and for one that began with saved KV.

    With a pipeline, it is exact only without a prefix cache. An attempt to plan that finds no KV is not recorded, but it marks the
    prefix that it looks up as recently used. With overlap there are no such attempts.
    """
    if run.saved_blocks:
        raise ValueError(
            f"the run began with {run.saved_blocks:,} KV blocks from a file (--kv-save), and the record does not say which; "
            "replay a run of a server that began without"
        )
    drafts = _Recorded()
    scheduler = Scheduler(policy_of(run), run.capacity, run.limits, reuse=run.reuse, speculation=drafts)
    tier = scheduler.ledger.pool.tier = Tier(run.host_blocks, run.host_moves) if run.host_blocks else None
    _know_adapters(scheduler, records)
    late = {id for r in records for id in _ended_by_text(r)}
    served = _served(run, records, {f.id for r in records for f in r.finished if f.reason == "stop"} - late)
    outstanding: deque[Plan] = deque()
    planned = 0
    for r in records:
        arrived = [served[a.id].request for a in r.arrived]
        for request in arrived:
            scheduler.submit(request)
        ended = [scheduler.abort(f.id) for f in r.finished if f.reason == "abort"]
        _load(scheduler, r.loaded)
        ended += _without_adapter(scheduler, r)
        while len(outstanding) < run.capacity.depth and planned < len(records) and records[planned].t_plan <= r.t_end:
            drafts.planned = dict(records[planned].drafted)
            plan = scheduler.schedule(records[planned].t_plan)
            if tier is not None:
                tier.moves()
            if not plan.work:
                break
            planned += 1
            outstanding.append(plan)
        if not outstanding:
            return
        plan = outstanding.popleft()
        failed = {f.id: "as recorded" for f in r.finished if f.reason == "error"} if r.error is None else {}
        tokens, seconds = _sampled(plan, served, Counter(r.emitted)), r.t_end - r.t_start
        result = StepResult(plan.step, tokens, seconds, error=r.error, failed=failed, bubble_s=r.bubble_s, deferred=r.deferred)
        done, dropped = scheduler.complete(plan, result, r.t_end)
        for request in scheduler.ledger.running:
            request.paused = request.id in r.paused
        ended += done
        ended += [scheduler.abort(f.id, f.reason) for f in r.finished if f.id in late]
        finished = [request for request in ended if request is not None]
        times = (r.t_plan, r.t_start, r.t_end)
        yield StepRecord.of(plan, result, scheduler.ledger, times, arrived, finished, dropped=dropped)


def difference(run: Run, records: Sequence[StepRecord]) -> Difference | None:
    """The first difference between the record and what the scheduler decides now; None if all decisions are the same."""
    count = 0
    for recorded, now in zip(records, replayed(run, records), strict=False):
        count += 1
        plain = replace(
            recorded,
            arrived=[a._replace(blocks=()) for a in recorded.arrived],
            refused=[],  # no decision of the scheduler, and when an adapter had arrived is none either
            loaded=[],
            finished=[f._replace(blocks=()) for f in recorded.finished],
        )
        for f in fields(StepRecord):
            if getattr(plain, f.name) != getattr(now, f.name):
                return Difference(recorded.step, f.name, getattr(plain, f.name), getattr(now, f.name))
    if count < len(records):
        return Difference(records[count].step, "work", records[count].work, [])
    return None


class Machine:
    """How long iterations take: `model`, fitted to the record, times the slowness of the recorded iteration at that moment
    (measured over expected time). So a disturbance hits any iteration that runs then. `errors`: of the model alone. `between_s`:
    the median time from an iteration's end to the next planning. With `overlap`, an iteration begins no earlier than the last one
    ended.
    """

    def __init__(self, records: Sequence[StepRecord], *, overlap: bool = False):
        ends = [-inf, *(r.t_end for r in records)]
        times = [r.t_end - (max(r.t_plan, end) if overlap else r.t_plan) for r, end in zip(records, ends, strict=False)]
        shapes = _shapes(records)
        samples = [(s, time) for r, s, time in zip(records, shapes, times, strict=True) if r.error is None and time > 0]
        if not samples:
            raise ValueError("no recorded iteration took time, so the time of others is unknown; record a longer run")
        self.model = Fitted.fit(samples)
        self.errors: Errors = self.model.errors(samples)
        self._since = [r.t_plan for r in records]
        self._slowness = [time / self.model.seconds(shape) for shape, time in zip(shapes, times, strict=True)]
        busy = [b.t_plan - a.t_end for a, b in pairwise(records) if a.num_running + a.num_waiting]
        self.between_s = max(0.0, median(busy)) if busy else 0.0

    def slowness(self, moment: float) -> float:
        return self._slowness[max(0, bisect_right(self._since, moment) - 1)]


def what_if(
    run: Run, records: Sequence[StepRecord], machine: Machine, policy: str, slo: Slo | None, options: Mapping[str, Any]
) -> list[StepRecord]:
    """The recorded arrivals served by another policy, on `machine` in virtual time. Each request ends after as many tokens as in
    the record; an aborted request ends at the same moment.

    A policy with a cost model begins with the recorded one, or else with the machine's. Raises ValueError for an unknown policy or
    option, or for an SLO that cannot be met.
    """
    state = run.cost if run.cost is not None else machine.model.state()
    # One plan at a time, because a record has no times of single pipeline stages.
    scheduler = Scheduler(
        _policy(policy, slo, options, state), replace(run.capacity, depth=1, overlap=False), run.limits, reuse=run.reuse
    )
    lost = {f.id: r.t_plan for r in records for f in r.finished if f.reason in ("abort", "error")}
    served = _served(run, records, {a.id for r in records for a in r.arrived} - lost.keys())
    written: list[StepRecord] = []
    _know_adapters(scheduler, records)
    took = {row.key: row.t - row.asked for r in records for row in r.loaded}
    replica = Replica(
        scheduler,
        machine.model,
        record=written.append,
        load_s=(lambda adapter: took.get(adapter.key, 0.0)) if scheduler.ledger.adapters.known else None,
        begin=records[0].t_plan,
        between_s=machine.between_s,
        slowness=machine.slowness,
    )
    requests = [script(entry.request, entry.answer) for entry in served.values()]
    requests.sort(key=lambda request: request.arrival)
    serve(requests, [replica], round_robin(), sorted((at, id) for id, at in lost.items()))
    return written


def _policy(name: str, slo: Slo | None, options: Mapping[str, Any], cost: Mapping[str, Any] | None) -> Policy:
    if name in POLICIES:
        raise ValueError(
            f"policy {name} plans groups of instances, and a record does not tell who had which KV, so it cannot be replayed; "
            f"`stallfree simulate --policy {name} --sp` simulates such groups"
        )
    return policies.load(name, Setup(None if cost is None else Fitted.from_state(cost), slo), **options)


STOP = -1
"""The token that ends a request. Fingerprints are not negative, and a request's own token is lower, so no other token equals it."""


@dataclass(frozen=True, slots=True)
class _Served:
    """A request and its tokens. `stop_after`: the number of output tokens of which the last is `STOP` (0: it never comes)."""

    request: Request
    tokens: Prompt
    stop_after: int

    @property
    def answer(self) -> list[int]:
        length = len(self.tokens)
        output = [self.tokens.at(length + number) for number in range(self.stop_after or self.request.max_tokens)]
        return [*output[:-1], STOP] if self.stop_after else output


def _served(run: Run, records: Sequence[StepRecord], stopped: Set[str]) -> dict[str, _Served]:
    """A new request for each that arrived, by id. The `stopped` ones end after as many tokens as recorded, or by `max_tokens`."""
    for r in records:
        if r.delivered or r.recalled or r.shown:
            raise ValueError(
                f"step {r.step} has requests that were transferred by another engine, and this record does not explain when they "
                "came; replay the run of an engine with --role both"
            )
    size = run.capacity.block_size
    lengths = Counter(id for r in records for id in r.emitted)
    outputs = {f.id: f.blocks for r in records for f in r.finished}
    served: dict[str, _Served] = {}
    extra = dict(pair for r in records for pair in r.extra_rows)
    constrained = {id for r in records for id in r.constrained}
    scored = {id for r in records for id in r.scored}
    tenants = {id: (tenant, weight) for r in records for id, tenant, weight in r.tenants}
    classes = dict(pair for r in records for pair in r.classes)
    predicted = dict(pair for r in records for pair in r.predicted)
    adapters = {id: key for r in records for id, key, *_ in r.adapters}
    for number, a in enumerate((a for r in records for a in r.arrived), 2):
        if run.reuse and len(a.blocks) != a.prompt_tokens // size:
            raise ValueError(
                f"request {a.id} has no fingerprints of its prompt, so its shared prefixes are unknown; record the run again"
            )
        tokens = Prompt(a.prompt_tokens, (*a.blocks, *outputs.get(a.id, ())), -number, size)
        slo = Slo.parse(a.slo) if a.slo else None
        tenant, weight = tenants.get(a.id, ("", 1.0))
        request = Request(
            a.id,
            tokens,
            a.max_tokens,
            stop_ids=frozenset({STOP}),
            arrival=a.arrival,
            priority=a.priority,
            tenant=tenant,
            weight=weight,
            slo=slo,
            service_class=classes.get(a.id, ""),
            adapter=adapters.get(a.id, ""),
            extra_rows=extra.get(a.id, 0),
            constrained=a.id in constrained,
            scored=a.id in scored,
        )
        request.predicted = predicted.get(a.id)
        served[a.id] = _Served(request, tokens, max(1, lengths[a.id]) if a.id in stopped else 0)
    return served


def _know_adapters(scheduler: Scheduler, records: Sequence[StepRecord]) -> None:
    """Tell the scheduler the sizes of the recorded adapters."""
    scheduler.ledger.adapters.known |= {key: (blocks, rank) for r in records for _, key, blocks, rank in r.adapters}


def _load(scheduler: Scheduler, loaded: Sequence[Loaded]) -> None:
    """Give adapters their blocks as the engine does, and let those of `loaded` arrive."""
    adapters, spare = scheduler.ledger.adapters, scheduler.ledger.spare
    for key in [None, *[row.key for row in loaded]]:
        if key is not None and key in adapters.resident:
            adapters.loaded(key)
        while adapters.next(spare) is not None:
            pass


def _without_adapter(scheduler: Scheduler, r: StepRecord) -> list[Request | None]:
    """End the requests whose adapter could not be loaded, and give its blocks back."""
    adapters, worked = scheduler.ledger.adapters, {id for id, _, _ in r.work}
    failed = [f.id for f in r.finished if f.reason == "error" and f.id not in worked and f.id in scheduler.ledger.requests]
    for key in dict.fromkeys([scheduler.ledger.requests[id].adapter for id in failed]):
        if adapters.state(key) == "loading":
            adapters.failed(key)
    return [scheduler.abort(id, "error") for id in failed]


class _Recorded:
    """A `Drafter` of as many drafts as were recorded: `planned`, by id. What was guessed is not in the record."""

    planned: Mapping[str, int] = MappingProxyType({})

    def add(self, draft: Draft) -> None:
        for request in draft.guessable if self.planned else ():
            draft.guess(request, (0,) * self.planned.get(request.id, 0))

    def learn(self, request: Request, before: int, tokens: Sequence[int]) -> None:
        pass

    def close(self) -> None:
        pass


def _sampled(plan: Plan, served: Mapping[str, _Served], emitted: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    tokens: dict[str, tuple[int, ...]] = {}
    for work in plan.work:
        if work.samples:
            request, first = served[work.id], work.start + (1 if work.decode else work.count)
            stop = request.stop_after + len(request.tokens) - 1
            positions = range(first, first + max(1, emitted.get(work.id, 0)))
            tokens[work.id] = tuple(STOP if position == stop else request.tokens.at(position) for position in positions)
    return tokens


def _ended_by_text(r: StepRecord) -> list[str]:
    """Ids of requests that their text ended, after the iteration was complete: they are out of the order of its work."""
    order = {id: number for number, (id, _, _) in enumerate(r.work)}
    ids = [f.id for f in r.finished if f.reason != "abort" and f.id in order]
    for number in range(1, len(ids)):
        if order[ids[number]] < order[ids[number - 1]]:
            return ids[number:]
    return []


def _shapes(records: Sequence[StepRecord]) -> list[list[tuple[int, int]]]:
    """The shape of each iteration, with the ranks of its adapters and the rows of its drafts."""
    adapter = {id: key for r in records for id, key, *_ in r.adapters}
    ranks = {key: rank for r in records for _, key, _, rank in r.adapters}
    shapes = []
    for r in records:
        used = {adapter[id] for id, _, _ in r.work if id in adapter}
        pieces = [(start, count) for _, start, count in r.work]
        pieces += [(sum(count for _, count in r.drafted), 0)] if r.drafted else []
        shapes.append([(sum(ranks.get(key, 0) for key in used), -1), *pieces] if used else pieces)
    return shapes
