"""The formula that names the splits worth a simulation, and what is simulated of each part."""

from dataclasses import replace

from stallfree.core.classes import Classes
from stallfree.core.slo import Slo
from stallfree.planner.candidates import Candidates, Shape
from stallfree.planner.parts import SHAPES, Lengths, estimate, pairs, parts
from stallfree.planner.site import Site
from stallfree.workload.traffic import Traffic

SLO = Slo.parse("ttft=1s,tbt=50ms")
TRAFFIC = Traffic(lengths="2000/30", requests=20, max_total=4096)
LENGTHS = Lengths.of(TRAFFIC)


def test_prompts_alone_serve_less_the_more_urgent_the_first_token_is():
    instance = Candidates(Site("llama2-7b", gpus=2)).shapes[Shape(1)]
    rates = [
        estimate(instance, LENGTHS, replace(SLO, ttft=replace(SLO.ttft, seconds=seconds))).prompts for seconds in (0.1, 0.4, 4.0)
    ]
    assert rates == sorted(rates)
    assert 0 <= rates[0] < rates[1] < rates[2] < 1 / instance.cost.seconds([(0, 2000)])


def test_a_pipeline_has_as_many_iterations_under_way_as_stages():
    shapes = Candidates(Site("llama2-7b", gpus=4)).shapes
    one, two = (estimate(shapes[Shape(1, pp)], LENGTHS, SLO).decodes for pp in (1, 2))
    assert one < two < 2.5 * one


def simulated(bursty, slo=SLO):
    """What `parts` simulates, by name, without running it."""
    cases = {}

    def find(wanted):
        cases.update(wanted)
        return {key: rate for key, (_, _, rate) in wanted.items()}

    return parts(Candidates(Site("llama2-7b", gpus=8)), TRAFFIC, slo, bursty, find), cases


def test_few_splits_are_simulated_for_each_part():
    found, cases = simulated(bursty=False)
    assert [SHAPES] * 3 == [len(rates) for rates in (found.alone, found.prompts, found.decodes)]
    assert {1} == {simulator.deployment.replicas for key, (simulator, *_) in cases.items() if key.startswith("alone")}


def test_under_bursty_arrivals_a_part_is_a_whole_pool_and_its_rate_is_shared_out():
    found, cases = simulated(bursty=True)
    for shape, rate in found.alone.items():
        simulator, _, whole = cases[f"alone {shape}"]
        assert 8 // shape.size == simulator.deployment.replicas
        assert whole == rate * simulator.deployment.replicas
    for shape in found.decodes:
        assert max(1, 4 // shape.size) == cases[f"decodes {shape}"][0].split.decode.replicas


def test_prompts_alone_are_judged_by_what_each_class_asks_of_its_first_token():
    classes = Classes.parse("chat: ttft=1s,tbt=50ms; batch: ttlt=60s")
    _, cases = simulated(bursty=False, slo=classes)
    expected = Classes.parse("chat: ttft=1s; batch: ttlt=60s")
    assert [expected] * SHAPES == [targets for key, (_, targets, _) in cases.items() if key.startswith("prompts")]
    assert {str(classes)} == {simulator.deployment.slo for key, (simulator, *_) in cases.items() if key.startswith("alone")}


def test_pairs_are_as_good_as_their_weaker_part_and_the_best_is_first():
    found, _ = simulated(bursty=False)
    rows = pairs(Candidates(Site("llama2-7b", gpus=8)), found)
    totals = [total for total, _, _ in rows]
    assert totals == sorted(totals, reverse=True)
    _, rate, pair = rows[0]
    shapes = [Shape.of(pool) for pool in (pair.prefill, pair.decode)]
    rates = (pair.prefill.replicas * found.prompts[shapes[0]], pair.decode.replicas * found.decodes[shapes[1]])
    assert rate == min(rates)
