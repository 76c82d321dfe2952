"""A replay decides as the run did, whatever happened in it; with another policy it answers what-if questions."""

import itertools
import random
from dataclasses import replace
from itertools import pairwise

import pytest

from stallfree import policies
from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity, StepResult
from stallfree.core.policy import Setup
from stallfree.core.record import Fingerprints, Refusal, Run, StepRecord, read
from stallfree.core.request import Request
from stallfree.core.slo import Slo
from stallfree.core.speculation import Speculation
from stallfree.engine.assemble import bytes_as_text
from stallfree.engine.engine import Engine
from stallfree.engine.streams import Reading
from stallfree.metrics.timeline import timelines
from stallfree.perf.fitted import Fitted
from stallfree.sim.replay import Machine, difference, what_if
from stallfree.sim.simulate import simulate
from stallfree.workload.workload import Arrival

TEXT = bytes_as_text()
LETTERS = TEXT.encode("abcdefghijklmnopqrstuvwxyz")
COST = (0.004, 0.02, 0.005, 0.005, 0.01, 0.0)


class Machinery:
    """An executor on a clock of its own, now and then disturbed or faulty."""

    def __init__(self, capacity: Capacity, seed: int):
        self.capacity = capacity
        self.now = 1000.0
        self._random, self._odd = random.Random(seed), random.Random(seed)
        self.constrained: set[str] = set()
        """Requests that are now and then deferred."""
        self._cost = Fitted(COST)
        self._plans = []

    def clock(self) -> float:
        self.now += 1e-5
        return self.now

    def submit(self, plan):
        self._plans.append(plan)

    def collect(self):
        plan = self._plans.pop(0)
        self.now += self._cost.seconds(plan.shape) * self._random.uniform(0.9, 1.3)
        luck = self._random.random()
        if luck < 0.004:
            raise RuntimeError("no memory")
        failed = {plan.work[0].id: "not a number"} if luck > 0.995 else {}
        can_wait = [w.id for w in plan.work if w.samples and w.id in self.constrained and w.id not in failed]
        deferred = {id for id in can_wait if self._odd.random() < 0.3}
        tokens = {
            w.id: w.verified(LETTERS[(w.start + w.count - len(w.drafts) + i) % 26] for i in range(w.count))
            for w in plan.work
            if w.samples and w.id not in deferred
        }
        return StepResult(plan.step, tokens, 0.0, failed=failed, deferred=deferred)

    def close(self):
        self._plans.clear()


class Fortune:
    """A proposer that is right in three of four cases."""

    draft_s = 0.0

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def propose(self, requests, most):
        return [
            tuple(LETTERS[(r.num_tokens + i) % 26] if self._random.random() < 0.75 else 0 for i in range(count))
            for r, count in zip(requests, most, strict=True)
        ]


TENANTS = {"acme": 3.0, "crawler": 1.0}
CLASSES = {"interactive": Slo.parse("ttft=200ms,tbt=30ms"), "batch": Slo.parse("ttlt=3s")}


def record(
    policy: str,
    seed: int,
    depth: int = 1,
    reuse: bool = True,
    overlap: bool = False,
    special: float = 0.0,
    shared: bool = False,
    guesses: bool = False,
) -> tuple[Run, list[StepRecord]]:
    """A busy run with conversations that share beginnings, ends of all kinds, and KV for few; as read from its file. `special`: the
    share of requests that are constrained, and of those that are scored. `shared`: among the tenants, in both classes. `guesses`:
    with drafts.
    """
    draw, odd, whose = random.Random(seed), random.Random(seed), random.Random(seed)
    capacity = Capacity(8, 60, 320, depth, overlap)
    machine = Machinery(capacity, seed)
    options = {"token_budget": 24} if policy == "sarathi" else {}
    cost = Fitted(COST) if policy == "slo" else None
    chosen = policies.load(policy, Setup(cost, Slo.parse("tbt=30ms") if cost else None), **options)
    lines: list[str] = []
    engine = Engine(
        machine,
        TEXT,
        chosen,
        Limits(8, 512),
        reuse=reuse,
        record=lambda step: lines.append(step.to_json()),
        prints=Fingerprints(8, b"key"),
        clock=machine.clock,
        speculation=Speculation(Fortune(seed), cost or Fitted(COST)) if guesses else None,
    )
    slo = getattr(chosen, "slo", None)
    run = Run(policy, capacity, Limits(8, 512), reuse, str(slo or ""), options, None if cost is None else cost.state())
    histories: list[list[int]] = []
    for number in range(60):
        beginning = draw.choice(histories) if histories and draw.random() < 0.5 else []
        prompt = [*beginning, *(draw.randrange(200) for _ in range(draw.choice((3, 20, 90))))][:200]
        stop_ids = frozenset(LETTERS[:2]) if draw.random() < 0.3 else frozenset()
        stop = ["fg", "tu"] if draw.random() < 0.3 else []
        own = Slo.parse("tbt=61.7ms") if draw.random() < 0.2 else None
        tenant, service_class = (whose.choice([*TENANTS]), whose.choice([*CLASSES])) if shared else ("", "")
        request = Request(
            f"r{number}",
            prompt,
            draw.choice((1, 5, 40)),
            stop_ids=stop_ids,
            arrival=machine.clock(),
            priority=draw.choice((0, 0, 1)),
            tenant=tenant,
            weight=TENANTS.get(tenant, 1.0),
            slo=CLASSES.get(service_class, own),
            service_class=service_class,
            constrained=odd.random() < special,
            scored=odd.random() < special,
        )
        if request.constrained:
            machine.constrained.add(request.id)
        engine.submit(request, Reading(stop))
        for _ in range(draw.randrange(8)):
            if engine.busy:
                engine.step()
        histories.append([*prompt, *request.output])
        if draw.random() < 0.15:
            engine.abort(f"r{number}")
    while engine.busy:
        engine.step()
    return read([run.to_json(), *lines])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("policy", policies.names())
def test_the_unchanged_policy_decides_the_same(policy, seed):
    run, records = record(policy, seed)
    assert {"stop", "length", "abort"} <= {f.reason for r in records for f in r.finished}
    assert difference(run, records) is None


@pytest.mark.parametrize("policy", ["sarathi", "slo"])
def test_with_several_plans_in_flight_too(policy):
    run, records = record(policy, 5, depth=3, reuse=False)
    assert difference(run, records) is None


@pytest.mark.parametrize("policy", ["sarathi", "slo"])
def test_constrained_and_scored_requests_are_planned_as_they_were(policy):
    run, records = record(policy, 6, depth=2, overlap=True, special=0.4)
    assert any(r.constrained for r in records)
    assert any(r.scored for r in records)
    assert any(r.deferred for r in records)
    assert difference(run, records) is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("policy", "depth"), [*itertools.product(policies.names(), (1, 2)), *itertools.product(("sarathi", "slo"), (3,))]
)
def test_with_drafts_too(policy, depth):
    special = 0.2 if policy in ("sarathi", "slo") else 0.0
    run, records = record(policy, 7, depth, reuse=depth < 3, overlap=depth == 2, special=special, guesses=True)
    assert any(r.drafted for r in records)
    assert any(len(r.emitted) > len(set(r.emitted)) for r in records)
    assert difference(run, records) is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("policy", policies.names())
def test_with_iterations_that_overlap_too(policy, seed):
    run, records = record(policy, seed, depth=2, overlap=True)
    assert any(b.t_plan < a.t_end for a, b in pairwise(records))
    assert {"stop", "length", "abort"} <= {f.reason for r in records for f in r.finished}
    assert difference(run, records) is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("policy", policies.names())
def test_tenants_of_different_weights_in_two_classes_are_served_as_they_were(policy, seed, overlap):
    run, records = record(policy, seed, depth=1 + overlap, overlap=overlap, shared=True)
    assert {*TENANTS.items()} == {(tenant, weight) for r in records for _, tenant, weight in r.tenants}
    assert {*CLASSES} == {service_class for r in records for _, service_class in r.classes}
    assert difference(run, records) is None


def test_tenants_and_classes_in_a_simulation_are_served_as_they_were():
    capacity, cost = Capacity(16, 200, 600), Fitted(COST)
    targets = CLASSES["interactive"]
    mix = itertools.cycle(itertools.product(TENANTS, CLASSES))
    arrivals = [
        Arrival(number / 40, 20 + 37 * number % 400, 5 + 11 * number % 60, (), tenant, service_class)
        for number, (tenant, service_class) in zip(range(80), mix, strict=False)
    ]
    result = simulate(
        arrivals,
        lambda: policies.load("slo", Setup(Fitted.from_state(cost.state()), targets)),
        cost,
        capacity,
        Limits(8, 512),
        records=True,
        leap=1,
        classes=CLASSES,
        weights=TENANTS,
    )
    header = Run("slo", capacity, Limits(8, 512), reuse=False, slo=str(targets), options={}, cost=cost.state())
    run, records = read([header.to_json(), *(step.to_json() for step in result.records[0])])
    assert {*TENANTS.items()} == {(tenant, weight) for r in records for _, tenant, weight in r.tenants}
    assert any(r.num_waiting for r in records)
    assert difference(run, records) is None


def test_a_forecast_is_kept_and_a_refusal_is_no_decision_of_the_scheduler():
    run, records = record("sarathi", 1)
    first = records[0].arrived[0].id
    changed = [
        replace(records[0], predicted=[(first, 0.25)], refused=[Refusal(0.1, "acme", "too many requests")]),
        *records[1:],
    ]
    assert difference(run, changed) is None


def test_what_if_of_overlapping_iterations_takes_them_one_after_the_other():
    run, records = record("sarathi", 4, depth=2, overlap=True)
    replayed = what_if(run, records, Machine(records, overlap=True), "sarathi", None, run.options)
    was, now = records[-1].t_end - records[0].t_plan, replayed[-1].t_end - replayed[0].t_plan
    assert was == pytest.approx(now, rel=0.1)


def test_without_a_prefix_cache_too():
    run, records = record("sarathi", 6, reuse=False)
    assert difference(run, records) is None


def test_the_recorded_runs_share_prefixes_and_run_out_of_kv():
    runs = [record("sarathi", seed)[1] for seed in range(4)]
    assert all(sum(count for r in records for _, count in r.cached) > 100 for records in runs)
    assert any(r.preempted for records in runs for r in records)


def test_another_decision_is_named_with_its_step():
    run, records = record("sarathi", 1)
    changed = replace(run, options={"token_budget": 25})
    assert "step 0 differs in budget: recorded 24, replayed 25" == str(difference(changed, records))


def test_a_record_without_fingerprints_is_refused():
    run, records = record("sarathi", 1)
    bare = [replace(r, arrived=[a._replace(blocks=()) for a in r.arrived]) for r in records]
    with pytest.raises(ValueError, match="no fingerprints of its prompt"):
        difference(run, bare)


def test_what_if_serves_the_same_requests_with_the_same_lengths():
    run, records = record("sarathi", 2)
    replayed = what_if(run, records, Machine(records), "prefill-first", None, {})
    was, now = timelines(records), timelines(replayed)
    ended = [id for id, line in was.items() if line.reason in ("stop", "length")]
    assert len(ended) > 30
    assert was.keys() == now.keys()
    assert [len(was[id].tokens) for id in ended] == [len(now[id].tokens) for id in ended]


def test_what_if_answers_with_a_tighter_target():
    run, records = record("slo", 3)
    machine = Machine(records)

    def long(slo: str) -> int:
        replayed = what_if(run, records, machine, "slo", Slo.parse(slo), {})
        return sum(r.t_end - r.t_plan > 0.015 for r in replayed)

    assert 2 * long("tbt=12ms") < long("tbt=60ms")


def test_the_same_policy_simulated_comes_near_the_record():
    run, records = record("sarathi", 4)
    replayed = what_if(run, records, Machine(records), "sarathi", None, run.options)
    was, now = records[-1].t_end - records[0].t_plan, replayed[-1].t_end - replayed[0].t_plan
    assert was == pytest.approx(now, rel=0.1)


def test_what_if_with_an_slo_that_cannot_be_met_is_refused():
    run, records = record("sarathi", 1)
    with pytest.raises(ValueError, match="cannot be met"):
        what_if(run, records, Machine(records), "slo", Slo.parse("tbt=1us"), {})
