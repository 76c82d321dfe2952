"""Whatever arrives, leaves or is lost, groups of instances give each request its tokens once, and all accounts agree."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity, StepResult
from stallfree.core.request import Refused, Request
from stallfree.elastic.scheduler import GroupScheduler
from tests.elastic.test_elastic import POLICIES, ROOM

NUMBER = 4


class Counting:
    """A cluster that only counts what each request has on each instance."""

    def __init__(self):
        self.rooms = [ROOM] * NUMBER
        self.capacity = Capacity(1, NUMBER * ROOM, NUMBER * ROOM - NUMBER, depth=NUMBER)
        self.kept: dict[str, dict[int, int]] = {}

    def run(self, plan):
        for work, kept in zip(plan.work, plan.kept, strict=True):
            have = self.kept.setdefault(work.id, {})
            assert work.start == sum(have.values())
            assert {*kept, *have} <= {*plan.members}
            assert work.tokens == tuple(range(work.start, work.start + work.count))  # whichever, a token is its position
            for member, count in kept.items():
                have[member] = have.get(member, 0) + count
        for member in range(NUMBER):
            assert sum(kept.get(member, 0) for kept in self.kept.values()) <= ROOM

    def move(self, id, target):
        self.kept[id] = {target: sum(self.kept[id].values())}

    def drop(self, id):
        self.kept.pop(id, None)


def ended(plan):
    return StepResult(plan.step, {w.id: (w.start + w.count,) for w in plan.work if w.samples}, 0.01)


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.integers(1, 2 * ROOM), st.integers(1, 40)),
        st.tuples(st.just("end"), st.integers(0, NUMBER), st.just(0)),
        st.tuples(st.just("abort"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("fail"), st.integers(0, NUMBER), st.just(0)),
        st.tuples(st.just("lose"), st.integers(0, 1), st.just(0)),
    ),
    max_size=40,
)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=60, deadline=None)
@given(events=EVENTS, max_seqs=st.integers(1, 12))
def test_every_request_gets_its_tokens_once(policy, events, max_seqs):
    cluster = Counting()
    scheduler = GroupScheduler(POLICIES[policy](), cluster, Limits(max_seqs))
    requests, out, now = [], [], 0.0

    def plan():
        while len(out) < NUMBER and (made := scheduler.schedule(now)).work:
            cluster.run(made)
            out.append(made)
        assert len(scheduler.ledger.running) <= max_seqs

    def end(number, *, error=None):
        made = out.pop(number % len(out))
        result = ended(made) if error is None else StepResult(made.step, {}, 0.01, error=error)
        scheduler.complete(made, result, now)
        scheduler.ledger.check()

    for kind, number, more in events:
        now += 0.01
        if kind == "arrive":
            requests.append(Request(str(len(requests)), range(number), more, arrival=now, priority=number % 3))
            scheduler.submit(requests[-1])
        elif kind == "abort":
            scheduler.abort(str(number))
        elif kind == "lose":
            gone = scheduler.lost(restart=bool(number))
            assert not gone or not number
            cluster.kept.clear()
            out.clear()
        elif out:
            end(number, error="boom" if kind == "fail" else None)
        plan()
    while out:
        now += 0.01
        end(0)
        plan()
    for request in requests:
        assert request.finish_reason in ("length", "abort", "error")
        length = len(request.prompt)
        assert request.output == list(range(length, length + len(request.output)))
        assert request.finish_reason != "length" or len(request.output) == request.max_tokens
    assert cluster.rooms == scheduler.instances.free
    assert not cluster.kept
    assert not scheduler.ledger.requests
    assert scheduler.ledger.pool.num_free == NUMBER * ROOM


def test_the_most_urgent_prompt_is_offered_first():
    scheduler = GroupScheduler(POLICIES["apart"](), Counting(), Limits(1))
    for name, priority in (("late", 1), ("soon", 0)):
        scheduler.submit(Request(name, range(10), 2, priority=priority))
    assert ["soon"] == [work.id for work in scheduler.schedule(0.0).work]


def test_a_decode_that_waits_for_a_prompt_of_its_instance_is_stalled():
    scheduler = GroupScheduler(POLICIES["one ring"](), Counting())
    scheduler.submit(Request("a", range(10), 5))
    first = scheduler.schedule(0.0)
    scheduler.complete(first, ended(first), 0.01)
    scheduler.submit(Request("b", range(10), 5))
    second = scheduler.schedule(0.02)
    assert (["b"], ("a",)) == ([work.id for work in second.work], second.stalled)


def test_an_id_is_in_use_until_no_plan_has_it():
    scheduler = GroupScheduler(POLICIES["apart"](), Counting())
    scheduler.submit(Request("a", range(10), 5))
    plan = scheduler.schedule(0.0)
    scheduler.abort("a")
    with pytest.raises(Refused, match="'a' is already in use"):
        scheduler.submit(Request("a", range(10), 5))
    done, dropped = scheduler.complete(plan, ended(plan), 0.01)
    assert ([], ["a"]) == (done, dropped)
    scheduler.submit(Request("a", range(10), 5))


def test_a_plan_completes_once():
    scheduler = GroupScheduler(POLICIES["apart"](), Counting())
    scheduler.submit(Request("a", range(10), 5))
    plan = scheduler.schedule(0.0)
    scheduler.complete(plan, ended(plan), 0.01)
    with pytest.raises(ValueError, match="step 0 .* is no plan in flight"):
        scheduler.complete(plan, ended(plan), 0.01)
