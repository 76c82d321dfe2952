"""Prefill and decode in two pools: all tokens come, KV is where it should be, and a full pool holds the other back."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

from stallfree.core.classes import Classes
from stallfree.core.slo import Slo
from stallfree.metrics.report import report
from stallfree.perf import links, shape
from stallfree.sim import pairings
from stallfree.sim.deployment import Deployment, Split
from stallfree.sim.simulator import Simulator, instance
from stallfree.sim.split import SplitSimulator, place
from stallfree.workload.traffic import Traffic
from stallfree.workload.workload import Arrival

PREFILL = Deployment("llama2-7b", policy="hybrid-only", max_tokens=2048, max_model_len=4096)
DECODE = Deployment("llama2-7b", policy="sarathi", token_budget=512, max_model_len=4096)
CHATS = Traffic(lengths="median=500,p90=2000/median=60,p90=200", max_total=4000, requests=80)


def split(pairing="distserve", **more):
    return Split(PREFILL, DECODE, pairing, **({"nodes": 2, "per_node": 1} | more))


@pytest.mark.parametrize("pairing", pairings.PAIRINGS)
@pytest.mark.parametrize("rate", [2.0, 12.0])
def test_everybody_gets_all_tokens_in_order(pairing, rate):
    many = split(pairing, nodes=2, per_node=4)
    many = replace(many, prefill=replace(PREFILL, replicas=2), decode=replace(DECODE, replicas=3))
    result = SplitSimulator(many).run(CHATS.stream(rate, 0))
    wanted = Counter(a.output_tokens for a in CHATS.stream(rate, 0))
    assert wanted == Counter(len(line.tokens) for line in result.lines)
    assert all(line.tokens == sorted(line.tokens) for line in result.lines)
    assert all(line.scheduled >= line.arrival for line in result.lines)
    assert result.transfers.transferred + result.transfers.local == sum(number for length, number in wanted.items() if length > 1)


def test_both_pools_know_whose_a_request_is_and_judge_it_by_its_class():
    owned = replace(CHATS, mix="acme: 50% class=chat; crawler: 50% class=batch priority=1")
    classes = Classes.parse("chat: ttft=2s,tbt=100ms; batch: ttlt=60s")
    pools = split()
    pools = replace(pools, prefill=replace(PREFILL, tenant_weights="acme=3"), decode=replace(DECODE, tenant_weights="acme=3"))
    simulator = SplitSimulator(pools)
    lines = simulator.run(owned.stream(2.0, 0)).lines
    assert {("acme", "chat", 0), ("crawler", "batch", 1)} == {(line.tenant, line.service_class, line.priority) for line in lines}
    judged = simulator.trial(owned, 2.0, 0, classes)
    assert ({"chat", "batch"}, {"acme", "crawler"}) == (judged.classes.keys(), judged.tenants.keys())


def test_what_moves_is_the_kv_of_the_prompts():
    result = SplitSimulator(split()).run(CHATS.stream(2.0, 0))
    prompts = sum(a.prompt_tokens for a in CHATS.stream(2.0, 0) if a.output_tokens > 1)
    kv = shape.Sharded(shape.load("llama2-7b"), 1, 1).kv_bytes_per_token
    assert prompts * kv == pytest.approx(result.transfers.bytes)


def lone(pairing, **more):
    """A request of 2,000 + 3 tokens by itself: how long it waits for its KV, and when its tokens come."""
    result = SplitSimulator(split(pairing, **more)).run([Arrival(0.0, 2000, 3)])
    return result.transfers.exposed_s, result.lines[0].tokens


KV = 2000 * shape.Sharded(shape.load("llama2-7b"), 1, 1).kv_bytes_per_token


def test_kv_that_leaves_after_the_prompt_delays_the_first_token_by_its_transfer():
    network = links.load("eth-25g")
    waited, tokens = lone("distserve", link="eth-25g")
    assert network.latency_s + KV / network.bandwidth == pytest.approx(waited)
    instance = Simulator(PREFILL).instance
    assert instance.front_s + instance.cost.seconds([(0, 2000)]) + waited == pytest.approx(tokens[0])


def test_kv_that_leaves_layer_by_layer_delays_it_by_the_last_layer_where_the_link_keeps_up():
    network = links.load("ib-400g")
    waited, _ = lone("splitwise", link="ib-400g")
    assert network.latency_s + KV / shape.load("llama2-7b").num_layers / network.bandwidth == pytest.approx(waited)


def test_in_one_node_kv_goes_over_the_devices_own_links():
    assert lone("distserve", nodes=1, per_node=2, link="eth-10g")[0] < lone("distserve", link="eth-10g")[0] / 10


def test_a_decode_pool_without_room_holds_prefills_back():
    small = instance(DECODE)
    small = small._replace(capacity=replace(small.capacity, num_blocks=260))
    coming = [Arrival(0.001 * i, 2000, 200) for i in range(6)]
    simulator = SplitSimulator(split(), decode=small)
    result = simulator.run(coming)
    alone = (SplitSimulator(split()).run(coming[:1])).lines[0]
    first = sorted(line.tokens[0] for line in result.lines)
    # Two fit at a time, and the next ones wait until these have ended.
    whole = alone.tokens[-1] - alone.tokens[0]
    assert first[1] - first[0] < 0.2 * whole < first[2] - first[1]
    assert 6 == result.transfers.transferred


def test_splitwise_spills_prompts_when_many_are_pending():
    coming = [Arrival(0.001 * i, 2000, 20) for i in range(30)]
    result = SplitSimulator(split("splitwise")).run(coming)
    assert 0 < result.transfers.local < 30
    assert 0 == SplitSimulator(split("distserve")).run(coming).transfers.local


def test_splitwise_keeps_requests_where_their_prompts_are_when_no_token_machine_has_room():
    small = instance(DECODE)
    small = small._replace(capacity=replace(small.capacity, num_blocks=260))
    coming = [Arrival(0.001 * i, 2000, 200) for i in range(3)]
    result = SplitSimulator(split("splitwise"), decode=small).run(coming)
    assert (2, 1) == (result.transfers.transferred, result.transfers.local)
    assert [200] * 3 == [len(line.tokens) for line in result.lines]


def test_what_is_promised_to_a_token_machine_counts_before_it_comes():
    small = instance(DECODE)
    small = small._replace(capacity=replace(small.capacity, num_blocks=140))
    two = replace(split("splitwise", nodes=1, per_node=3), decode=replace(DECODE, replicas=2))
    result = SplitSimulator(two, decode=small).run([Arrival(0.001 * i, 2000, 200) for i in range(3)])
    assert (2, 1) == (result.transfers.transferred, result.transfers.local)


def test_splitwise_chooses_the_token_machine_with_the_least_kv_and_distserve_that_with_the_fewest_requests():
    pools = SimpleNamespace(kv=[50, 20, 10].__getitem__, load=[1, 5, 2].__getitem__)
    assert 1 == pairings.load("splitwise", [[0, 1]]).decode(0, pools)
    assert 0 == pairings.load("distserve", [[0, 1]]).decode(0, pools)


def test_a_trial_reports_as_a_co_located_one_does():
    slo = Slo.parse("ttft=1s,tbt=100ms")
    report = SplitSimulator(split()).trial(CHATS, 2.0, 0, slo)
    other = Simulator(DECODE).trial(CHATS, 2.0, 0, slo)
    assert (80, {"ttft", "tbt"}) == (report.completed, set(report.slo_attainment))
    assert (other.completed, other.output_tokens) == (report.completed, report.output_tokens)
    assert 0 < report.goodput.share <= 1


def test_idle_time_is_a_share_of_each_pool():
    result = SplitSimulator(split()).run(CHATS.stream(1.0, 0))
    assert 0 < result.decode_idle < result.prefill_idle < 1
    assert 0 < result.transfers.exposed_s < result.transfers.decode_s
    assert report(result.lines).completed == 80


def test_replicas_are_placed_in_turn():
    two = replace(PREFILL, replicas=2), replace(DECODE, replicas=2, tp=2)
    assert ([(0,), (1,)], [(0,), (1,)]) == place(Split(*two, nodes=2, per_node=4))
    large = replace(PREFILL, replicas=1), replace(DECODE, tp=4)
    assert ([(0,)], [(1, 2)]) == place(Split(*large, nodes=3, per_node=2))


def test_replicas_larger_than_a_node_share_nodes_stage_by_stage():
    """DistServe's placement of OPT-175B: on each of three nodes, one stage of TP3 prefill and one of TP4 decode."""
    pools = replace(PREFILL, tp=3, pp=3), replace(DECODE, tp=4, pp=3)
    assert ([(0, 1, 2)], [(0, 1, 2)]) == place(Split(*pools, nodes=4, per_node=8))
    twice = tuple(replace(pool, replicas=2) for pool in pools)
    assert ([(0, 1, 2), (3, 4, 5)],) * 2 == place(Split(*twice, nodes=6, per_node=8))


def test_kv_of_stages_that_share_nodes_goes_over_the_devices_own_links():
    pools = (replace(pool, pp=4, node=1) for pool in (PREFILL, DECODE))
    shared = Split(*pools, "distserve", "eth-10g", nodes=4, per_node=3)
    apart = replace(shared, nodes=8, per_node=1)
    result = [SplitSimulator(each).run([Arrival(0.0, 2000, 3)]).transfers.exposed_s for each in (shared, apart)]
    assert result[0] < result[1] / 10


@pytest.mark.parametrize(
    ("deployment", "says"),
    [
        (split(nodes=1), "take 2 devices, which do not fit 1 node of 1"),
        (split(link="eth-200g"), "unknown link 'eth-200g'"),
        (split(pairing="splitwize"), "did you mean 'splitwise'"),
        (replace(split(), decode=replace(DECODE, model="llama3-8b")), "prefill has model llama2-7b and decode llama3-8b"),
        (replace(split(), decode=replace(DECODE, kv="fp8")), "prefill has kv fp16 and decode fp8"),
    ],
)
def test_what_cannot_be_is_refused(deployment, says):
    with pytest.raises(ValueError, match=says):
        SplitSimulator(deployment)


def test_a_request_that_can_never_fit_is_refused():
    with pytest.raises(ValueError, match="can never be served"):
        SplitSimulator(split()).run([Arrival(0.0, 5000, 10)])
