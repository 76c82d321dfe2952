"""Simulated adapters take time on the host's link and share the KV memory. All requests are served, and replay decides as the
simulation did.
"""

from collections import Counter
from dataclasses import replace

import pytest

from stallfree.core.plan import Capacity
from stallfree.core.record import StepRecord
from stallfree.core.slo import Slo
from stallfree.metrics.report import report
from stallfree.perf.fitted import Fitted
from stallfree.sim.deployment import Deployment
from stallfree.sim.replay import Machine, difference, what_if
from stallfree.sim.shelf import Shelf
from stallfree.sim.simulate import Simulation
from stallfree.sim.simulator import Instance, Simulator, calibrated, instance
from stallfree.sim.trials import Trials
from stallfree.workload.traffic import Traffic
from stallfree.workload.workload import Arrival

COST = Fitted((0.011, 0.0042, 0.0025, 0.0025, 0.0002, 0.0005))
LLAMA = Deployment(model="llama2-7b", policy="sarathi", token_budget=512, max_model_len=4096, rank="8,16,32")
LOAD = Traffic(lengths="median=300,p90=900/median=40,p90=90", max_total=2000, rate=8.0, requests=120, adapters=40)


def small(blocks: int = 200, size: int = 10, load_s: float = 0.5) -> Instance:
    """A machine with few KV blocks, for adapters of `size` blocks that come in `load_s`."""
    return Instance(COST, Capacity(16, blocks, 4096), None, "small", shelf=Shelf((8,), lambda rank: size, lambda rank: load_s))


def run(arrivals, placed=None, policy="sarathi", **changes) -> Simulation:
    deployment = replace(LLAMA, policy=policy, token_budget=512 if policy == "sarathi" else None, **changes)
    return Simulator(deployment, placed).run(arrivals, records=True)


def checked(deployment: Deployment, placed: Instance | None, arrivals) -> list[StepRecord]:
    """The records of a run, which replay reproduces, after a journey through JSON."""
    simulator = Simulator(deployment, placed)
    (records,) = simulator.run(arrivals, records=True).records
    records = [StepRecord.from_json(record.to_json()) for record in records]
    assert difference(simulator.header, records) is None
    return records


def test_the_first_request_waits_for_its_adapter():
    without, waited = (run([Arrival(1.0, 300, 3, adapter=adapter)], small()).lines[0] for adapter in ("", "3"))
    assert 1.0 + COST.seconds([(0, 300)]) == pytest.approx(without.tokens[0])
    assert 1.5 + COST.seconds([(8, -1), (0, 300)]) == pytest.approx(waited.tokens[0])


def test_the_next_request_for_it_does_not_wait():
    early, late = run([Arrival(0.0, 300, 3, adapter="3"), Arrival(5.0, 300, 3, adapter="3")], small()).lines
    assert early.ttft == pytest.approx(late.ttft + 0.5)


def test_adapters_come_one_after_another():
    lines = run([Arrival(0.0, 16, 1, adapter=str(number)) for number in range(4)], small()).lines
    assert [0.5, 1.0, 1.5, 2.0] == pytest.approx([line.tokens[0] for line in lines], abs=0.1)


def test_those_whose_adapter_comes_hold_nobody_up():
    first, second = run([Arrival(0.0, 16, 1, adapter="1"), Arrival(0.0, 16, 1)], small()).lines
    assert ("1", "0") == (first.id, second.id)
    assert first.tokens[0] < 0.1


def test_an_iteration_costs_the_ranks_of_the_adapters_in_it():
    placed = instance(LLAMA)
    arrivals = [Arrival(0.0, 64, 4, adapter=adapter) for adapter in ("0", "1", "0")]
    (records,) = run(arrivals, placed).records
    whole = [r for r in records if len(r.work) == 3]
    assert whole
    for r in whole:
        work = [(start, count) for _, start, count in r.work]
        assert placed.cost.seconds([(8 + 16, -1), *work]) == pytest.approx(r.t_end - r.t_start)


def test_adapters_in_use_take_blocks_from_kv():
    (records,) = run([Arrival(0.0, 15, 9, adapter="0"), Arrival(0.0, 15, 9, adapter="1")], small(load_s=0.01)).records
    (both, *_) = (r for r in records if len(r.emitted) == 2)
    # Each request has two KV blocks or one; those of an adapter that nobody uses count as free.
    assert 200 - 2 * 10 - 4 <= both.free_blocks <= 200 - 2 * 10 - 2
    assert 200 == records[-1].free_blocks


@pytest.mark.parametrize("policy", ["sarathi", "slo", "prefill-first", "orca", "adapter-clusters"])
def test_everybody_is_served_when_few_of_the_adapters_fit(policy):
    """KV for 200 blocks, of which 40 adapters would take 400."""
    arrivals = [replace(a, at=a.at / 4) for a in LOAD.draw()]
    placed = small(load_s=0.05)
    lines = run(arrivals, placed, policy).lines
    assert {str(number): a.output_tokens for number, a in enumerate(arrivals)} == {line.id: len(line.tokens) for line in lines}


@pytest.mark.parametrize("policy", ["sarathi", "slo", "prefill-first"])
def test_a_rare_adapter_is_served_while_others_would_take_every_block(policy):
    """Two popular adapters keep the KV full; the request for a third comes early and is served in its turn."""
    arrivals = [Arrival(0.05 * number, 300, 60, adapter=str(number % 2)) for number in range(400)]
    arrivals.insert(41, Arrival(2.01, 300, 60, adapter="2"))
    lines = run(arrivals, small(load_s=0.05), policy).lines
    rare = next(line for line in lines if line.id == "41")
    neighbours = [line.tokens[0] for line in lines if line.id in ("40", "60")]
    assert rare.tokens[0] <= max(neighbours) + 2.0


@pytest.mark.parametrize("policy", ["sarathi", "slo", "prefill-first", "adapter-clusters"])
@pytest.mark.parametrize("placed", [None, small(load_s=0.05)], ids=["a100", "small"])
def test_a_replay_decides_as_the_simulation_did(policy, placed):
    deployment = replace(LLAMA, policy=policy, token_budget=512 if policy == "sarathi" else None)
    records = checked(deployment, placed, LOAD.draw())
    asked = {id: adapter for r in records for id, adapter, *_ in r.adapters}
    assert {str(number): a.adapter for number, a in enumerate(LOAD.draw())} == asked
    assert set(asked.values()) == {row.key for r in records for row in r.loaded}
    assert all(row.asked < row.t for r in records for row in r.loaded)


def test_some_adapters_are_loaded_again_where_they_do_not_fit():
    records = checked(LLAMA, small(load_s=0.05), LOAD.draw())
    assert max(Counter(row.key for r in records for row in r.loaded).values()) > 1


def test_a_replay_with_a_prefix_cache_decides_as_the_simulation_did():
    # Requests for different adapters share no prefixes, though their prompts are equal.
    arrivals = [Arrival(0.4 * number, 1100, 20, (1, 2), adapter=str(number % 3)) for number in range(12)]
    (records,) = Simulator(replace(LLAMA, prefix_cache=True), small(blocks=600)).run(arrivals, records=True).records
    cached = dict(pair for r in records for pair in r.cached)
    assert [0, 0, 0] == [cached[str(number)] for number in range(3)]
    assert all(cached[str(number)] >= 1024 for number in range(3, 12))


def test_another_policy_is_asked_with_the_loads_as_they_were():
    simulator = Simulator(LLAMA, small(load_s=0.05))
    (records,) = simulator.run(LOAD.draw(), records=True).records
    written = what_if(simulator.header, records, Machine(records), "prefill-first", None, {})
    assert Counter(f.id for r in records for f in r.finished) == Counter(f.id for r in written for f in r.finished)
    took = {row.key: row.t - row.asked for r in written for row in r.loaded}
    assert min(took.values()) > 0.04


def test_replicas_load_their_own():
    arrivals = [Arrival(0.001 * number, 64, 4, adapter="0") for number in range(4)]
    result = Simulator(replace(LLAMA, replicas=2), small()).run(arrivals, records=True)
    assert [["0"], ["0"]] == [[row.key for r in records for row in r.loaded] for records in result.records]


def test_a_trial_with_adapters_is_the_same_in_another_process():
    simulator = Simulator(LLAMA)
    direct = simulator.trial(LOAD, 8.0, 0, Slo.parse("tbt=100ms"))
    with Trials({"it": Simulator(LLAMA)}) as trials:
        assert direct == trials.reports({"one": ("it", LOAD, 8.0, 0, Slo.parse("tbt=100ms"))})["one"]


@pytest.mark.parametrize("pp", [1, 2])
def test_the_same_load_gives_the_same_records(pp):
    first, again = (run(LOAD.draw(), pp=pp).records for _ in range(2))
    assert first == again


def test_a_calibration_knows_what_adapters_cost():
    placed = instance(LLAMA)
    fitted = calibrated(placed)
    work = [(700, 1)] * 20
    more = [fitted.seconds([(total, -1), *work]) for total in (0, 64, 1024)]
    assert more == sorted(set(more))
    assert placed.cost.seconds([(1024, -1), *work]) == pytest.approx(more[-1], rel=0.2)


REFUSING = replace(LLAMA, policy="slo", token_budget=None, slo="ttft=1s@p90,tbt=100ms", rank="8")
CROWD = Traffic(lengths="1024/64", rate=60.0, requests=300, adapters=20)


def test_requests_that_would_be_late_are_refused():
    lines = Simulator(replace(REFUSING, on_late="refuse")).run(CROWD.stream()).lines
    refused = [line for line in lines if line.reason == "refused"]
    assert 20 < len(refused) < 280
    assert all(not line.tokens for line in refused)
    served = [line.ttft for line in lines if line.tokens]
    assert 300 == len(refused) + len(served)
    every = [line.ttft for line in Simulator(REFUSING).run(CROWD.stream()).lines]
    assert sum(ttft <= 1 for ttft in served) > sum(ttft <= 1 for ttft in every)
    assert {"refused": len(refused)} == report(lines).errors


def test_a_record_of_a_run_that_refuses_is_replayed():
    records = checked(replace(REFUSING, on_late="refuse"), None, CROWD.stream())
    assert 20 < len({a.id for r in records for a in r.arrived}) < 280


def test_nobody_is_refused_when_all_are_in_time():
    lines = Simulator(replace(REFUSING, on_late="refuse")).run(replace(CROWD, rate=2.0, requests=40).stream()).lines
    assert {"length"} == {line.reason for line in lines}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"on_late": "wait"}, "--on-late 'wait' is neither serve nor refuse"),
        ({"on_late": "refuse", "policy": "prefill-first"}, "policy 'prefill-first' forecasts no first tokens.*take policy slo"),
        ({"rank": "1024", "gpu_memory_utilization": 0.17}, "an adapter of rank 1,024 takes .* KV blocks, and there are"),
        ({"rank": "8", "engine": "fits.json"}, "a fitted engine .* leave out --rank"),
    ],
)
def test_a_deployment_that_cannot_have_them_is_named(change, says):
    with pytest.raises(ValueError, match=says):
        Simulator(replace(LLAMA, token_budget=None, max_model_len=256, **change))


def test_a_measured_machine_has_no_prices_of_adapters():
    with pytest.raises(ValueError, match="no prices of adapters on small; leave out --rank"):
        Simulator(LLAMA, small()._replace(shelf=None))


def test_requests_for_adapters_need_their_rank():
    with pytest.raises(ValueError, match="it is not said how large these are; give --rank 8"):
        Simulator(replace(LLAMA, rank=None)).run(LOAD.stream())
