"""A deployment in words becomes what the simulator runs, or an error that says what would work."""

from dataclasses import replace

import pytest

from stallfree.core.slo import Slo
from stallfree.perf.fitted import Fitted
from stallfree.sim.deployment import Deployment
from stallfree.sim.simulator import Simulator, calibrated, instance
from stallfree.sim.trials import Trials
from stallfree.workload.traffic import Traffic

LLAMA = Deployment(model="llama3-8b", policy="sarathi", token_budget=512)
SOME = Traffic(lengths="median=300,p90=900/median=40,p90=90", requests=60)


def test_the_kv_is_what_the_weights_leave():
    whole, half = instance(LLAMA).capacity, instance(replace(LLAMA, gpu_memory_utilization=0.5)).capacity
    assert (16, 8192, 1) == (whole.block_size, whole.max_model_len, whole.depth)
    tokens = (whole.num_blocks - half.num_blocks) * 16
    assert 0.4 * 81920 * 2**20 == pytest.approx(tokens * 2 * 8 * 128 * 2 * 32, rel=0.001)


def test_stages_are_plans_in_flight_and_devices_are_paid():
    single, four = instance(LLAMA), instance(replace(LLAMA, tp=2, pp=2))
    assert 2 == four.capacity.depth
    assert 4 * single.dollars == four.dollars


def test_a_ring_holds_the_kv_of_all_its_groups_and_its_devices_are_paid():
    single, ring = instance(LLAMA), instance(replace(LLAMA, sp=4))
    assert 4 * single.capacity.num_blocks <= ring.capacity.num_blocks < 4 * single.capacity.num_blocks + 4
    assert 4 * single.dollars == ring.dollars
    report = Simulator(replace(LLAMA, sp=4)).trial(SOME, 3.0, 5, Slo.parse("tbt=100ms"))
    assert 60 == report.completed


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"sp": 0}, "a ring cannot have 0 groups"),
        ({"sp": 2, "pp": 2}, "sequence parallelism 2 with 2 pipeline stages"),
        ({"sp": 2, "engine": "some.json"}, "leave out --sp"),
        ({"sp": 2, "rank": "8"}, "leave out --rank"),
    ],
)
def test_a_ring_that_has_no_price_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        instance(replace(LLAMA, **fields))


def test_classes_and_weights_come_from_words():
    simulator = Simulator(replace(LLAMA, slo="chat: tbt=60ms; batch: ttlt=60s", tenant_weights="acme=3, crawler=0.5"))
    assert (Slo.parse("tbt=60ms"), {"acme": 3.0, "crawler": 0.5}) == (simulator.targets, simulator.weights)
    assert {"chat": Slo.parse("tbt=60ms"), "batch": Slo.parse("ttlt=60s")} == simulator.named


def test_targets_without_a_name_are_of_no_class():
    assert {} == Simulator(replace(LLAMA, slo="tbt=60ms")).named


@pytest.mark.parametrize("weights", ["acme", "acme=0", "acme=inf", "=1", "acme=1,acme=2", "acme=x"])
def test_weights_that_are_none_are_named(weights):
    with pytest.raises(ValueError, match="weight"):
        Simulator(replace(LLAMA, tenant_weights=weights))


def test_a_trial_is_the_same_here_and_in_another_process():
    simulator = Simulator(LLAMA)
    direct = simulator.trial(SOME, 3.0, 5, Slo.parse("tbt=100ms"))
    with Trials({"it": simulator}) as trials:
        by_process = trials.reports({"one": ("it", SOME, 3.0, 5, Slo.parse("tbt=100ms"))})["one"]
    assert direct == by_process
    assert 60 == direct.completed


def test_a_few_short_requests_do_not_make_a_capacity_without_end():
    simulator = Simulator(LLAMA)
    with Trials({"it": simulator}) as trials:
        rates = trials.capacities({"it": (replace(SOME, lengths="64/4", requests=8), Slo.parse("tbt=100ms"), 64.0)}, tolerance=0.5)
    assert rates["it"].above * 64 < 1.6 * 512 / instance(LLAMA).cost.seconds([(0, 64)] * 8)


def test_the_slo_policy_knows_what_a_calibration_finds_and_keeps_its_target():
    simulator = Simulator(replace(LLAMA, policy="slo", token_budget=None, slo="tbt=60ms"))
    model, truth = calibrated(simulator.instance), simulator.instance.cost
    shape = [(500, 1)] * 20 + [(300, 400)]
    assert isinstance(model, Fitted)
    assert truth.seconds(shape) == pytest.approx(model.seconds(shape), rel=0.3)
    report = simulator.trial(replace(SOME, requests=300), 6.0, 0, Slo.parse("tbt=60ms"))
    assert report.slo_attainment["tbt"].met


def test_a_calibration_prices_the_experts_of_a_mixture():
    """Without their price, a lone decode of Qwen3-30B-A3B would be taken for 40 % longer than it is, and 16 for 43 % shorter."""
    place = instance(Deployment(model="qwen3-30b-a3b", hardware="a100-80g", max_model_len=8192))
    prices = calibrated(place)
    for decodes in (1, 4, 16, 64):
        shape = [(1024, 1)] * decodes
        assert place.cost.seconds(shape) == pytest.approx(prices.seconds(shape), rel=0.05)


def test_policies_that_learn_do_not_share_what_they_learned():
    simulator = Simulator(replace(LLAMA, policy="slo", token_budget=None))
    first, second = simulator.policy(), simulator.policy()
    first.cost.learn([(10, 1)], 5.0)
    assert first.cost.seconds([(10, 1)]) != second.cost.seconds([(10, 1)])


def test_the_header_of_its_records_tells_the_policy_again():
    header = Simulator(replace(LLAMA, slo="tbt=80ms")).header
    assert ("sarathi", {"token_budget": 512}, "80ms") == (header.policy, header.options, str(header.targets.tbt).partition("@")[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": None}, "which model"),
        ({"model": "lama3-8b"}, "did you mean 'llama3-8b'"),
        ({"model": "llama2-70b"}, "TP 2 or PP 2 or fp8 weights would do"),
        ({"tp": 3}, "TP 3 does not divide"),
        ({"hardware": "a100-80"}, "did you mean 'a100-80g'"),
        ({"policy": "sarati"}, "did you mean 'sarathi'"),
        ({"policy": "slo"}, "takes no token_budget: it finds its own"),
        ({"policy": "orca"}, "takes no token_budget"),
        ({"token_budget": 0}, "at least 1 token"),
        ({"slo": "tbt=1ms"}, "tbt=1ms cannot be met: .* ask for at least about"),
        ({"slo": "tbt=100"}, "has no unit"),
        ({"max_seqs": 0}, "max_seqs"),
        ({"block_size": 0}, "a KV block cannot have 0 tokens"),
        ({"gpu_memory_utilization": 1.5}, "a share of 1.5"),
        ({"max_model_len": 9_000_000}, "a request of 9,000,000 tokens .* does not fit"),
        ({"watermark": 1.0}, "watermark"),
        ({"engine": "fast"}, "unknown engine 'fast'"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_simulated(change, says):
    with pytest.raises(ValueError, match=says):
        Simulator(replace(LLAMA, **change))
