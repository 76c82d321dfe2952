"""Groups that form anew for every iteration lose no token, leave no request waiting, and keep what each policy promises."""

import re

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from stallfree.elastic.fixed import Fixed
from stallfree.elastic.loongserve import LoongServe
from stallfree.elastic.policy import fewest_with_room, joined, spread
from stallfree.elastic.stall_free import StallFree
from stallfree.elastic.state import Instances, Iteration, Stream
from stallfree.sim.deployment import Deployment
from stallfree.sim.elastic import Rings, serve
from stallfree.workload.workload import Arrival

ROOM = 400


class Prices:
    """An iteration takes 1 ms for each of its pieces and each 10 tokens of an instance. 50 tokens saturate an instance."""

    rooms = [ROOM] * 4
    front_s = 0.0

    def seconds(self, degree, shape):
        assert all(count > 0 for _, count in shape)
        tokens = sum(count for _, count in shape)
        pairs = sum(count * (before + count / 2) for before, count in shape)
        return 1e-3 * (1 + len(shape) + max(50, tokens / degree) / 10 + pairs / 5000 / degree + 0.3 * (degree - 1))

    def moving(self, tokens):
        return 1e-5 * tokens


PRICES = Prices()
POLICIES = {
    "loongserve": lambda: LoongServe(PRICES, 4),
    "stall-free": lambda: StallFree(PRICES, 4, 0.02, lambda stream: 0.1),
    "one ring": lambda: Fixed(PRICES, [range(4)]),
    "apart": lambda: Fixed(PRICES, [[0, 1], [2, 3]]),
}


class Watched:
    """A policy whose every plan is checked: streams hold what they have, and the instances what they hold."""

    def __init__(self, policy):
        self.policy = policy
        self.degrees, self.together = set(), False

    def ended(self, stream, seconds):
        self.policy.ended(stream, seconds)

    def plan(self, instances, now):
        held = [0] * len(instances.rooms)
        coming = [0] * len(instances.rooms)
        for stream in instances.running:
            assert stream.computed <= stream.length
            for member, tokens in stream.held.items():
                assert tokens > 0
                held[member] += tokens
        for iteration in instances.computing:
            for kept in iteration.chunks.values():
                for member, tokens in kept.items():
                    coming[member] += tokens
            for member in iteration.decodes.values():
                coming[member] += 1
        assert [f + h + c for f, h, c in zip(instances.free, held, coming, strict=True)] == list(instances.rooms)
        plans = self.policy.plan(instances, now)
        members = [member for plan in plans for member in plan.members]
        assert len(members) == len({*members})
        self.degrees |= {len(plan.members) for plan in plans if plan.chunks}
        self.together |= any(plan.chunks and plan.decodes for plan in plans)
        return plans


loads = st.lists(st.tuples(st.floats(0, 0.3), st.integers(1, 700), st.integers(1, 60)), min_size=1, max_size=25)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(load=loads)
def test_every_request_gets_all_its_tokens_and_none_is_lost_or_doubled(name, load):
    longest = 2 * ROOM if name == "apart" else 4 * ROOM  # nothing is served that does not fit a group
    load = [(at, min(prompt, longest - output - 60), output) for at, prompt, output in sorted(load)]
    arrivals = [Arrival(*each) for each in load]
    lines = serve(arrivals, PRICES, [Watched(POLICIES[name]())]).lines
    assert sorted((line.arrival, line.prompt_tokens, len(line.tokens)) for line in lines) == sorted(load)
    assert all(line.tokens == sorted(line.tokens) and line.tokens[0] > line.arrival for line in lines)


def test_a_long_prompt_gets_a_ring_and_leaves_its_kv_on_the_fewest_instances():
    for policy, degree in ((LoongServe(PRICES, 4), 4), (StallFree(PRICES, 4, 0.03, lambda stream: 0.03), 3)):
        instances = Instances([ROOM] * 4)
        instances.arrive(stream := Stream("a", 0.0, 350))
        (iteration,) = policy.plan(instances, 0.0)
        assert len(iteration.members) == degree
        assert [*iteration.chunks[stream].values()] == [350]
        instances.begin(iteration)
        assert instances.end(iteration) == [stream]
        (iteration,) = policy.plan(instances, 1.0)
        assert iteration.members == {*stream.held}  # the group has shrunk, and nothing moved
        assert not iteration.moved


def test_decodes_without_room_take_in_another_instance_and_move_nothing():
    policy, instances = LoongServe(PRICES, 2), Instances([100, 100])
    instances.arrive(stream := Stream("a", 0.0, 100))
    (iteration,) = policy.plan(instances, 0.0)
    instances.begin(Iteration(frozenset([0]), {stream: {0: 100}}))
    instances.end(instances.computing[0])
    (iteration,) = policy.plan(instances, 1.0)
    assert iteration.members == {0, 1}
    assert iteration.decodes == {stream: 1}
    instances.begin(iteration)
    instances.end(iteration)
    assert stream.held == {0: 100, 1: 1}


def test_loongserve_moves_decodes_away_if_that_is_cheaper_than_that_they_wait():
    policy, instances = LoongServe(PRICES, 2), Instances([ROOM] * 2)
    for number in range(2):
        instances.arrive(stream := Stream(str(number), 0.0, 40))
        instances.begin(iteration := Iteration(frozenset([number]), {stream: {number: 40}}))
        instances.end(iteration)
    policy.ended(Stream("before", 0.0, 1, 100), 1.0)
    instances.arrive(Stream("long", 1.0, 300))
    plans = policy.plan(instances, 1.0)
    assert [plan.moved for plan in plans if plan.chunks] == [40]
    assert len({member for stream in instances.running for member in stream.held}) == 1


def test_stall_free_groups_leave_no_ready_decode_out_and_keep_the_time():
    policy = Watched(StallFree(PRICES, 4, 0.02, lambda stream: 0.15))
    late = []

    def plan(instances, now):
        plans = Watched.plan(policy, instances, now)
        for each in plans:
            streams = [s for s in instances.ready(each.members) if s.computed == s.length - 1]
            assert {*streams} == {*each.decodes}
            shape = [(s.computed, sum(kept.values())) for s, kept in each.chunks.items()] + [(s.computed, 1) for s in each.decodes]
            if each.decodes and sum(count for _, count in shape[: len(each.chunks)]) > 64:
                late.append(PRICES.seconds(len(each.members), shape))
        return plans

    watched = type("", (), {"plan": staticmethod(plan), "ended": policy.ended})()
    serve([Arrival(0.02 * i, 900 if i % 10 == 5 else 60, 30) for i in range(60)], PRICES, [watched])
    assert policy.together
    assert policy.degrees > {1}
    assert late
    assert max(late) <= 0.02


def test_a_request_that_fits_no_group_is_refused_with_what_fits():
    with pytest.raises(ValueError, match=re.escape("the prompt has 1,600 tokens; with room for one more, at most 1,599 fit")):
        Instances([ROOM] * 4).arrive(Stream("a", 0.0, 1600))
    with pytest.raises(ValueError, match=re.escape("1,601 tokens does not fit all instances, which hold 1,600")):
        serve([Arrival(0.0, 1590, 11)], PRICES, [POLICIES["loongserve"]()])
    with pytest.raises(ValueError, match="Fixed plans no work for 1 requests"):
        serve([Arrival(0.0, 900, 1)], PRICES, [POLICIES["apart"]()])


@pytest.mark.parametrize(
    ("iteration", "what"),
    [
        (lambda new, old: Iteration(frozenset([0]), {new: {0: 51}}), "has 50 tokens"),
        (lambda new, old: Iteration(frozenset([0]), {new: {}}), "has 50 tokens"),
        (lambda new, old: Iteration(frozenset([0]), {new: {1: 50}}), "busy or no members"),
        (lambda new, old: Iteration(frozenset([0]), decodes={old: 0}), "busy or no members"),
        (lambda new, old: Iteration(frozenset([0]), decodes={new: 0}), "decodes before its prompt"),
        (lambda new, old: Iteration(frozenset([0, 1]), {new: {1: 50}}), "room for 30 tokens, not for 50"),
    ],
)
def test_an_impossible_iteration_changes_nothing(iteration, what):
    instances = Instances([100, 100])
    instances.arrive(old := Stream("old", 0.0, 70))
    instances.begin(first := Iteration(frozenset([1]), {old: {1: 70}}))
    instances.end(first)
    instances.arrive(new := Stream("new", 0.0, 50))
    with pytest.raises(ValueError, match=what):
        instances.begin(iteration(new, old))
    assert (instances.free, instances.waiting, instances.computing) == ([100, 30], [new], [])


@given(
    tokens=st.integers(1, 500),
    room=st.dictionaries(st.integers(0, 9), st.integers(-5, 200), min_size=1),
)
def test_a_prompt_is_spread_whole_or_not_at_all(tokens, room):
    members, whole = list(room), sum(max(0, each) for each in room.values())
    if whole < tokens:
        with pytest.raises(ValueError, match=f"{tokens} tokens do not fit"):
            spread(tokens, members, room)
        return
    few = fewest_with_room(tokens, members, {member: max(0, each) for member, each in room.items()})
    before = dict(room)
    parts = spread(tokens, few, room)
    assert sum(parts.values()) == tokens
    assert {member: before[member] - parts.get(member, 0) for member in room} == room
    assert all(0 < part <= before[member] for member, part in parts.items())


def test_kv_moves_whole_and_only_where_there_is_room():
    instances = Instances([100, 100])
    for name, held in (("a", {0: 60}), ("b", {1: 50})):
        instances.arrive(stream := Stream(name, 0.0, sum(held.values())))
        instances.begin(iteration := Iteration(frozenset(held), {stream: held}))
        instances.end(iteration)
    first, second = instances.running
    with pytest.raises(ValueError, match="a cannot move 60 tokens to instance 1, with room for 50"):
        instances.move(first, 1)
    assert (instances.free, first.held) == ([40, 50], {0: 60})
    instances.leave(second)
    instances.move(first, 1)
    assert (instances.free, first.held) == ([100, 40], {1: 60})


def test_instances_that_share_a_stream_are_joined_also_through_others():
    instances = Instances([ROOM] * 5)
    for name, held in (("a", {0: 5, 1: 5}), ("b", {1: 5, 3: 5}), ("c", {2: 5})):
        instances.arrive(stream := Stream(name, 0.0, sum(held.values())))
        instances.begin(iteration := Iteration(frozenset(held), {stream: held}))
        instances.end(iteration)
    assert sorted(joined(instances)) == [(0, 1, 3), (2,), (4,)]
    assert sorted(joined(instances, [(2, 4)])) == [(0, 1, 3), (2, 4)]


def test_rings_have_the_prices_of_fixed_ones():
    from stallfree.sim.simulator import instance

    rings = Rings(Deployment("llama2-7b", "a800", 2, sp=4))
    whole = instance(Deployment("llama2-7b", "a800", 2, sp=4, max_model_len=100_000))
    assert sum(rings.rooms) // 16 == whole.capacity.num_blocks
    assert rings.seconds(4, [(0, 50_000)]) == whole.cost.seconds([(0, 50_000)])
    assert rings.seconds(1, [(0, 50_000)]) > 3 * rings.seconds(4, [(0, 50_000)])
    # each of two devices sends its half of 0.52 MB a token, over 185 GB/s
    assert rings.moving(200_000) == pytest.approx(200_000 * 262_144 / 185e9, rel=1e-3)
    assert rings.moving(400_000) / rings.moving(200_000) == pytest.approx(2, rel=1e-3)


def test_a_request_goes_to_the_replica_with_the_fewest_tokens_to_compute():
    watched = [Watched(POLICIES["loongserve"]()) for _ in range(2)]
    arrivals = [Arrival(0.0, 900, 5), *(Arrival(0.001 * i, 20, 5) for i in range(1, 20))]
    run = serve(arrivals, PRICES, watched)
    long = next(line for line in run.lines if line.prompt_tokens == 900)
    assert 19 == sum(line.tokens[0] < long.tokens[0] for line in run.lines)  # none is behind it
    assert all(replica.iterations for replica in run.replicas)
