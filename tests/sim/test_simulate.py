"""A simulation is the same in leaps as step by step, its accounts agree, and its results match the records."""

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest

from stallfree import policies
from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity
from stallfree.core.policy import Setup
from stallfree.core.slo import Slo
from stallfree.executors.simulated import Linear
from stallfree.metrics.report import report
from stallfree.metrics.timeline import timelines
from stallfree.perf.fitted import Fitted
from stallfree.policies.sarathi import Sarathi
from stallfree.sim.chrome import trace
from stallfree.sim.simulate import simulate
from stallfree.workload.workload import Arrival, Workload

COST = Fitted((0.011, 0.0042, 0.0025, 0.0025, 0.0002, 0.0005))
ROOMY = Capacity(16, 5000, 8192)
TIGHT = Capacity(16, 330, 4096)
LOADS = {
    "calm": ("poisson", "median=300,p90=900/median=60,p90=200", 2.0),
    "bursty": ("gamma:cv=4", "median=200,p90=2000/median=40,p90=300 + 10%:1/1", 12.0),
}


def load(name: str, requests: int = 120) -> list[Arrival]:
    arrivals, lengths, rate = LOADS[name]
    return Workload.parse(arrivals, lengths, 4000).draw(rate, 3, requests=requests)


def conversations(requests: int = 150) -> list[Arrival]:
    """Prompts that share their beginnings: the blocks of three families, each longer than what came before."""
    coming = load("bursty", requests)
    return [replace(a, blocks=tuple(1000 * (i % 3) + b for b in range(a.prompt_tokens // 512))) for i, a in enumerate(coming)]


def policy(name: str):
    known = policies.takes(name)
    budget = {"token_budget": 256} if "token_budget" in known else {}
    return lambda: policies.load(name, **budget)


def run(arrivals, name="sarathi", cost=COST, capacity=ROOMY, limits=None, **more):
    return simulate(arrivals, policy(name), cost, capacity, limits or Limits(64), **more)


@pytest.mark.parametrize("capacity", [ROOMY, TIGHT], ids=["roomy", "tight"])
@pytest.mark.parametrize("load_name", LOADS)
@pytest.mark.parametrize("name", policies.names())
def test_leaps_end_where_steps_do(name, load_name, capacity):
    leaps, steps = (run(load(load_name), name, capacity=capacity, records=True, leap=leap) for leap in (64, 1))
    assert steps.records == leaps.records
    assert steps.lines == leaps.lines
    assert report(steps.lines, Slo.parse("ttft=1s,tpot=60ms")) == report(leaps.lines, Slo.parse("ttft=1s,tpot=60ms"))
    assert [r.active_s for r in steps.replicas] == [r.active_s for r in leaps.replicas]


@pytest.mark.parametrize("num_blocks", [300, 420, 5000])
@pytest.mark.parametrize("name", ["sarathi", "prefill-first", "orca"])
def test_leaps_end_where_steps_do_with_a_prefix_cache_too(name, num_blocks):
    capacity = Capacity(16, num_blocks, 4096)
    leaps, steps = (run(conversations(), name, capacity=capacity, reuse=True, records=True, leap=leap) for leap in (64, 1))
    assert sum(count for r in steps.records[0] for _, count in r.cached) > 1000
    assert steps.records == leaps.records
    assert steps.lines == leaps.lines


def test_leaps_end_where_steps_do_with_a_cost_model_that_only_knows_shapes():
    leaps, steps = (run(load("calm"), cost=Linear(), records=True, leap=leap) for leap in (64, 1))
    assert steps.records == leaps.records


@pytest.mark.parametrize("name", ["sarathi", "slo"])
def test_iterations_scatter_as_they_did_when_calibrated_and_leaps_end_where_steps_do(name):
    scatter = (0.9, 1.0, 1.1, 1.4)
    leaps, steps = (run(load("calm"), name, scatter=scatter, records=True, leap=leap) for leap in (64, 1))
    assert steps.records == leaps.records
    records = steps.records[0]
    took = [(r.t_end - r.t_start) / COST.seconds([(start, count) for _, start, count in r.work]) for r in records]
    counts = Counter(round(ratio, 9) for ratio in took)
    assert set(scatter) == set(counts)
    assert min(counts.values()) > 0.2 * len(records)


def test_the_margin_of_slo_follows_the_scatter():
    def margin(scatter):
        calibrated = partial(policies.load, "slo", Setup(Fitted(COST.prices)))
        return simulate(load("bursty"), calibrated, COST, ROOMY, records=True, scatter=scatter).records[0][-1].margin

    assert margin(()) < 1.1
    assert 1.3 < margin((1.0,) * 9 + (1.5,))


def test_leaps_end_where_steps_do_when_outputs_end_before_max_tokens():
    leaps, steps = (run(load("calm"), "orca", max_tokens=1000, records=True, leap=leap) for leap in (64, 1))
    assert steps.records == leaps.records
    assert {"stop"} == {line.reason for line in steps.lines}


def test_a_leap_asks_the_policy_once():
    class Counting(Sarathi):
        plans = 0

        def plan(self, draft):
            Counting.plans += 1
            super().plan(draft)

    result = simulate(load("calm"), lambda: Counting(256), COST, ROOMY)
    assert Counting.plans < result.iterations / 5


def test_without_records_the_timelines_are_the_same():
    assert run(load("bursty"), records=True).lines == run(load("bursty")).lines


@pytest.mark.parametrize("name", ["sarathi", "prefill-first", "chunked-only"])
@pytest.mark.parametrize("depth", [1, 2])
def test_the_timelines_are_those_that_the_records_tell(name, depth):
    result = run(load("bursty"), name, capacity=replace(TIGHT, depth=depth), records=True)
    assert timelines(result.records[0]) == {line.id: line for line in result.lines}


def test_the_prefix_cache_hits_of_a_run_are_in_its_report():
    result = run(conversations(), reuse=True, records=True)
    figures = report(result.lines)
    assert sum(count for r in result.records[0] for _, count in r.cached) == figures.cached_tokens > 1000
    assert 0 == report(run(conversations()).lines).cached_tokens
    assert timelines(result.records[0]) == {line.id: line for line in result.lines}


def test_the_report_has_a_bench_reports_figures():
    result = run(load("calm"))
    figures = report(result.lines, Slo.parse("tbt=100ms"), 2.0)
    assert 120 == figures.completed
    assert {"tbt"} == figures.slo_attainment.keys()
    assert sum(a.output_tokens for a in load("calm")) == figures.output_tokens


def test_everybody_gets_the_tokens_that_were_drawn():
    result = run(load("bursty"), capacity=TIGHT)
    drawn = {str(number): a.output_tokens for number, a in enumerate(load("bursty"))}
    assert drawn == {line.id: len(line.tokens) for line in result.lines}


def test_timelines_may_be_handed_on_instead_of_kept():
    ended = []
    assert [] == run(load("calm"), ended=ended.append).lines
    assert run(load("calm")).lines == ended


@pytest.mark.parametrize("name", policies.names())
def test_the_same_input_gives_the_same_records(name):
    first, again = (run(load("bursty"), name, replicas=3, router="least-loaded", records=True).records for _ in range(2))
    assert first == again


def test_a_lone_request_takes_the_sum_of_its_iterations():
    result = run([Arrival(1.0, 300, 3)])
    chunks = [[(0, 256)], [(256, 44)], [(300, 1)], [(301, 1)]]
    expected = [1.0]
    for shape in chunks:
        expected.append(expected[-1] + COST.seconds(shape))
    assert expected[2:] == result.lines[0].tokens


def test_two_stages_of_one_plan_each_take_half_of_it():
    result = run([Arrival(0.0, 200, 1)], capacity=replace(ROOMY, depth=2), spans=True)
    whole = COST.seconds([(0, 200)])
    first, second = result.spans[0]
    assert (0.0, whole / 2) == (first.begin, first.end)
    assert (whole / 2, whole) == (second.begin, second.end)
    assert pytest.approx(0.5) == result.bubbles


def test_stages_work_on_one_plan_at_a_time_in_their_order():
    result = run(load("bursty"), capacity=replace(ROOMY, depth=3), spans=True)
    assert {0, 1, 2} == {span.stage for span in result.spans[0]}
    for stage in range(3):
        assert all(a.end <= b.begin for a, b in pairwise(span for span in result.spans[0] if span.stage == stage))
    by_step = {}
    for span in result.spans[0]:
        by_step.setdefault(span.step, []).append(span)
    assert all(a.end <= b.begin for spans in by_step.values() for a, b in pairwise(spans))


def test_a_pipeline_has_as_many_plans_in_flight_as_stages_and_no_more():
    result = run(load("bursty"), capacity=replace(ROOMY, depth=3), records=True)
    events = [moment for r in result.records[0] for moment in ((r.t_plan, 1), (r.t_end, -1))]
    out, most = 0, 0
    for _, change in sorted(events):
        out += change
        most = max(most, out)
    assert 3 == most


@pytest.mark.parametrize("name", ["calm", "bursty"])
def test_the_records_bubbles_are_all_but_those_at_the_very_end(name):
    result = run(load(name), capacity=replace(ROOMY, depth=3), spans=True, records=True)
    replica, end = result.replicas[0], result.records[0][-1].t_end
    ends = {span.stage: span.end for span in result.spans[0]}
    whole = 3 * replica.active_s - sum(replica.busy_s)
    assert pytest.approx(whole) == sum(r.bubble_s for r in result.records[0]) + sum(end - ends[stage] for stage in range(3))


def test_a_single_stage_has_no_bubbles():
    result = run(load("calm"), records=True)
    assert {0.0} == {r.bubble_s for r in result.records[0]}
    assert 0 == result.bubbles
    assert result.replicas[0].active_s < result.lines[-1].finished


def test_chrome_gets_a_row_for_each_replica_and_stage():
    result = run(load("calm"), capacity=replace(ROOMY, depth=2), replicas=2, spans=True)
    events = json.loads(json.dumps(trace(result.spans)))["traceEvents"]
    assert {(0, 0), (0, 1), (1, 0), (1, 1)} == {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"}
    assert {"replica 0", "replica 1", "stage 0", "stage 1"} == {e["args"]["name"] for e in events if e["ph"] == "M"}
    bars = sum(e["dur"] for e in events if e["ph"] == "X") / 1e6
    assert pytest.approx(sum(sum(replica.busy_s) for replica in result.replicas)) == bars


def test_the_slo_policy_runs_in_a_simulation():
    result = simulate(load("calm"), lambda: policies.load("slo", Setup(Fitted(COST.prices), Slo.parse("tbt=60ms"))), COST, ROOMY)
    assert report(result.lines, Slo.parse("tbt=60ms")).slo_attainment["tbt"].met


@pytest.mark.parametrize(
    ("arrivals", "says"),
    [
        ([Arrival(0.0, 9000, 5)], "request 0, at 0 s, can never be served: the prompt has 9000 tokens"),
        ([Arrival(0.0, 8000, 500)], "request 0.*more than the 8192"),
        ([Arrival(5.0, 8, 5), Arrival(2.0, 8, 5)], "at 2 s comes after one at 5 s"),
    ],
)
def test_what_cannot_be_simulated_is_named(arrivals, says):
    with pytest.raises(ValueError, match=says):
        run(arrivals)


def test_no_replicas_are_refused():
    with pytest.raises(ValueError, match="0 replicas"):
        run(load("calm"), replicas=0)


def test_a_policy_that_serves_nobody_is_named():
    class Idle:
        reserve, stall_free = "prompt", True

        def plan(self, draft):
            pass

    with pytest.raises(ValueError, match="Idle plans no work for 1 requests"):
        simulate([Arrival(0.0, 8, 5)], Idle, COST, ROOMY)
