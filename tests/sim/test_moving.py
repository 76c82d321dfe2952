"""Requests that are cut and moved at random lose and double nothing. Without a move, replicas do what co-located ones do. With cuts
at the prompt's end, they do what a prefill pool and a decode pool do.
"""

from collections import Counter
from dataclasses import replace
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from stallfree.core.plan import Capacity
from stallfree.core.policy import Setup
from stallfree.core.scheduler import Scheduler
from stallfree.core.slo import Slo
from stallfree.perf.fitted import Fitted
from stallfree.policies import load as policy
from stallfree.sim.cluster import serve
from stallfree.sim.deployment import Deployment, Split
from stallfree.sim.fabric import Port
from stallfree.sim.movers import MOVERS
from stallfree.sim.moving import Moving, Place
from stallfree.sim.pairings import Splitwise
from stallfree.sim.replica import Replica
from stallfree.sim.routers import load as router
from stallfree.sim.simulate import scripted
from stallfree.sim.simulator import instance
from stallfree.sim.split import SplitSimulator
from stallfree.sim.transfer import Pools
from stallfree.workload.traffic import Traffic
from stallfree.workload.workload import Arrival

COST = (0.011, 0.0042, 0.0025, 0.0025, 0.0002, 0.0005)
PLENTY = Capacity(16, 4000, 1000)
REQUESTS = st.builds(Arrival, st.floats(0, 3), st.integers(1, 600), st.integers(1, 120))
# Not two at one moment: the first of them begins alone here, and together with the second on replicas that know nothing of others.
ARRIVALS = st.lists(REQUESTS, min_size=1, max_size=20, unique_by=lambda a: a.at).map(lambda many: sorted(many, key=lambda a: a.at))
POLICIES = st.sampled_from(["sarathi", "slo"])


def making(name="sarathi", capacity=PLENTY, budget=128):
    """A function that makes a replica."""

    def make(**hooks):
        own = {"token_budget": budget} if name == "sarathi" else {}
        chosen = policy(name, Setup(Fitted(COST), Slo.parse("ttft=1s,tbt=100ms")), **own)
        return Replica(Scheduler(chosen, capacity, reuse=False), Fitted(COST), **hooks)

    return make


def path(bandwidth):
    ports = {}
    return lambda a, b: (ports.setdefault(("out", a), Port(bandwidth)), ports.setdefault(("in", b), Port(bandwidth)))


class Anywhere:
    """A mover that cuts and moves by chance."""

    def __init__(self, number, seed):
        self.number, self.draw, self.count = number, Random(seed), 0

    def place(self, request, cluster):
        source, target = self.draw.sample(range(self.number), 2)
        return Place(source, target if self.draw.random() < 0.7 else None, self.draw.randint(1, len(request.prompt)))

    def stepped(self, number, cluster, now):
        for replica in cluster.replicas:
            replica.scheduler.ledger.check()
        streams = cluster.streams(number)
        if streams and self.draw.random() < 0.5:
            target = self.draw.choice([other for other in range(self.number) if other != number])
            cluster.move(self.draw.choice(streams), number, target, now)

    def ended(self, request):
        self.count += 1


class Fixed:
    """A mover that does the same with each request, and moves no stream."""

    def __init__(self, place):
        self.place = place

    def stepped(self, number, cluster, now):
        pass

    def ended(self, request):
        pass


def moved(arrivals, mover, makes, bandwidth=1e9):
    """`arrivals` on replicas of `makes`, whose KV moves at so many bytes per second. Returns their timelines by id, and the
    cluster.
    """
    lines = {}

    def ended(request):
        line = request.sampling.line
        assert line.id not in lines
        lines[line.id] = line

    cluster = Moving(makes, [], mover, path(bandwidth), kv_bytes=1e6, layers=4, latency_s=1e-4, ended=ended)
    cluster.serve(scripted(arrivals, cluster.replicas[0].scheduler, None))
    return lines, cluster


@settings(max_examples=60, deadline=None)
@given(ARRIVALS, POLICIES, st.integers(0, 99), st.integers(46, 200), st.sampled_from([1e7, 1e9, 1e12]))
def test_no_token_is_lost_or_doubled_by_any_cuts_and_moves(arrivals, name, seed, blocks, bandwidth):
    mover = Anywhere(3, seed)
    lines, cluster = moved(arrivals, mover, [making(name, Capacity(16, blocks, 736))] * 3, bandwidth)
    assert {str(number): a.output_tokens for number, a in enumerate(arrivals)} == {id: len(x.tokens) for id, x in lines.items()}
    assert all(line.tokens == sorted(set(line.tokens)) and line.arrival <= line.scheduled for line in lines.values())
    assert mover.count == len(arrivals)
    for replica in cluster.replicas:
        replica.scheduler.ledger.check()
        assert (0, blocks) == (replica.num_requests, replica.scheduler.ledger.pool.num_free)


@settings(max_examples=20, deadline=None)
@given(ARRIVALS, POLICIES)
def test_without_a_move_replicas_do_what_co_located_ones_do(arrivals, name):
    turns = iter(range(len(arrivals)))
    apart, _ = moved(arrivals, Fixed(lambda request, cluster: Place(next(turns) % 2)), [making(name)] * 2)
    lines = {}
    replicas = [making(name)(ended=lambda r: lines.update({r.id: r.sampling.line})) for _ in range(2)]
    serve(scripted(arrivals, replicas[0].scheduler, None), replicas, router("round-robin"))
    assert lines == apart


@settings(max_examples=20, deadline=None)
@given(ARRIVALS, POLICIES, st.sampled_from([1e7, 1e9, 1e12]))
def test_a_cut_at_the_prompts_end_is_the_hand_off_of_two_pools(arrivals, name, bandwidth):
    cut, cluster = moved(arrivals, Fixed(lambda r, cluster: Place(0, 1, len(r.prompt))), [making(name)] * 2, bandwidth)
    lines, ports = {}, path(bandwidth)
    pools = Pools(
        [making(name)], [making(name)], Splitwise([[0]]), ports, kv_bytes=1e6, layers=4, latency_s=1e-4,
        ended=lambda r: lines.update({r.id: r.sampling.line}),
    )  # fmt: skip
    pools.serve(scripted(arrivals, pools.prefill[0].scheduler, None))
    assert lines == cut
    assert pools.transfers.bytes == pytest.approx(cluster.transfers.bytes)


def test_a_cut_inside_a_prompt_computes_its_parts_one_after_the_other():
    lines, _ = moved([Arrival(0.0, 500, 3)], Fixed(lambda request, cluster: Place(0, 1, 200)), [making(budget=600)] * 2, 1e15)
    cost = Fitted(COST)
    assert cost.seconds([(0, 200)]) + 1e-4 + cost.seconds([(200, 300)]) == pytest.approx(lines["0"].tokens[0], rel=1e-5)
    assert cost.seconds([(501, 1)]) == pytest.approx(lines["0"].gaps[1])


class Once(Fixed):
    """A mover that moves each stream once, when it has 10 tokens."""

    def __init__(self):
        super().__init__(lambda request, cluster: Place(0))

    def stepped(self, number, cluster, now):
        for request in cluster.streams(number):
            if len(request.output) == 10 and number == 0:
                assert cluster.move(request, 0, 1, now)


def test_a_stream_decodes_while_its_kv_flows_and_waits_only_for_the_last_tokens():
    still, _ = moved([Arrival(0.0, 500, 60)], Fixed(lambda request, cluster: Place(0)), [making()] * 2)
    lines, cluster = moved([Arrival(0.0, 500, 60)], Once(), [making()] * 2, 2e9)
    before, after = still["0"].gaps, lines["0"].gaps
    longer = [number for number, (a, b) in enumerate(zip(before, after, strict=True)) if b > a + 1e-9]
    flow = 1e-4 + 509 * 1e6 / 2e9
    (stop,) = longer
    assert stop - 9 == pytest.approx(flow / before[10], abs=1)
    assert 1e-4 + (stop - 9) * 1e6 / 2e9 == pytest.approx(after[stop] - before[stop], rel=1e-6)
    assert (1, 1) == (cluster.transfers.transferred, cluster.transfers.streams)


def test_a_move_without_room_changes_nothing():
    small = making(capacity=Capacity(16, 32, 500))

    class Tries(Once):
        def stepped(self, number, cluster, now):
            for request in cluster.streams(0):
                assert not cluster.move(request, 0, 1, now)

        place = None

    mover = Tries()
    mover.place = lambda request, cluster: Place(int(request.id))
    lines, cluster = moved([Arrival(0.0, 400, 50), Arrival(0.0, 400, 90)], mover, [small] * 2)
    assert Counter([50, 90]) == Counter(len(line.tokens) for line in lines.values())
    assert 0 == cluster.transfers.transferred


def test_two_prompts_that_wait_for_the_room_of_each_others_rests_are_joined():
    small = making(capacity=Capacity(16, 40, 600))
    mover = Fixed(lambda request, cluster: Place(int(request.id), 1 - int(request.id), 300))
    lines, _ = moved([Arrival(0.0, 500, 5)] * 2, mover, [small] * 2)
    assert [5, 5] == [len(line.tokens) for line in lines.values()]


BASE = Deployment("llama2-7b", max_model_len=4096, slo="ttft=1s,tbt=50ms", replicas=2)
PAIRS = {
    "taichi": (replace(BASE, policy="sarathi", token_budget=1024), replace(BASE, policy="sarathi", token_budget=128)),
    "dynaserve": (BASE, BASE),
}
CHATS = Traffic(lengths="median=500,p90=2000/median=60,p90=200", max_total=4000, requests=80)


def simulator(name, blocks=None):
    small = [instance(pool) for pool in PAIRS[name]]
    if blocks:
        small = [each._replace(capacity=replace(each.capacity, num_blocks=blocks)) for each in small]
    return SplitSimulator(Split(*PAIRS[name], name, nodes=2, per_node=2), *small)


@pytest.mark.parametrize("name", MOVERS)
@pytest.mark.parametrize(("rate", "blocks"), [(4.0, None), (30.0, None), (30.0, 300)])
def test_everybody_gets_all_tokens_from_each_mover(name, rate, blocks):
    lines = simulator(name, blocks).run(CHATS.stream(rate, 0)).lines
    assert Counter(a.output_tokens for a in CHATS.stream(rate, 0)) == Counter(len(line.tokens) for line in lines)


def test_taichi_moves_streams_where_memory_is_short():
    full = simulator("taichi", 300).run(CHATS.stream(30.0, 0)).transfers
    assert (0, True) == (simulator("taichi").run(CHATS.stream(4.0, 0)).transfers.streams, full.streams > 0)


def test_dynaserve_cuts_prompts_and_answers():
    transfers = simulator("dynaserve").run(CHATS.stream(12.0, 0)).transfers
    assert 0 < transfers.streams < transfers.transferred
    assert transfers.local > 0


@pytest.mark.parametrize("more", [{"prefix_cache": True}, {"rank": "8"}])
def test_what_cannot_move_is_refused_by_name(more):
    with pytest.raises(ValueError, match="taichi knows no prefix cache and no adapters"):
        SplitSimulator(Split(*(replace(pool, **more) for pool in PAIRS["taichi"]), "taichi"))
