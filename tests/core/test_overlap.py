"""With overlap the next iteration is planned while one runs: same tokens, nothing beyond known ends, nobody left out."""

from dataclasses import replace

import pytest

from stallfree.core.ledger import Limits
from stallfree.core.plan import UNKNOWN, Capacity, StepResult
from stallfree.core.record import StepRecord
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.policies import load, names
from stallfree.policies.sarathi import Sarathi
from tests.virtual import answer

ROOMY = Capacity(16, 1000, 4096, depth=2, overlap=True)


def scheduler(capacity=ROOMY, policy="sarathi", **limits):
    return Scheduler(load(policy) if isinstance(policy, str) else policy, capacity, Limits(**limits))


def begun(policy="sarathi", **options):
    """A scheduler with a plan out that brings the first token of the request "a"."""
    s = scheduler(policy=policy)
    request = Request("a", range(10), **({"max_tokens": 5} | options))
    s.submit(request)
    return s, request, s.schedule(0)


def test_a_decode_is_planned_before_its_token_is_known():
    s, _, first = begun()
    ahead = s.schedule(0)
    assert [(10, 1)] == ahead.shape
    assert (UNKNOWN,) == ahead.work[0].tokens
    s.complete(first, answer(first), 1)
    assert [(11, 1)] == s.schedule(1).shape


def test_without_overlap_a_second_plan_holds_no_decode_in_flight():
    s = scheduler(replace(ROOMY, overlap=False))
    s.submit(Request("a", range(10), 5))
    s.schedule(0)
    assert not s.schedule(0).work


def test_nothing_is_planned_beyond_max_tokens():
    s, _, _ = begun(max_tokens=1)
    assert not s.schedule(0).work


def test_what_was_planned_behind_a_stop_id_is_dropped():
    s, request, first = begun(stop_ids=frozenset({10}))
    ahead = s.schedule(0)
    assert ([request], []) == s.complete(first, answer(first), 1)
    assert ROOMY.num_blocks == s.ledger.pool.num_free
    assert ([], ["a"]) == s.complete(ahead, answer(ahead), 2)
    assert [10] == request.output
    assert [] == StepRecord.of(ahead, answer(ahead), s.ledger, (1, 1, 2), [], [], dropped=["a"]).emitted
    s.ledger.check()


def test_what_was_planned_behind_an_error_is_dropped():
    s, request, first = begun()
    ahead = s.schedule(0)
    s.complete(first, StepResult(0, {}, 0, error="boom"), 1)
    assert ([], ["a"]) == s.complete(ahead, answer(ahead), 2)
    assert ("error", []) == (request.finish_reason, request.output)


def test_where_kv_is_short_the_next_plan_waits_for_the_iteration_that_runs():
    s = scheduler(Capacity(4, 6, 24, depth=2, overlap=True))
    for id in "ab":
        s.submit(Request(id, range(11), 9))
    first = s.schedule(0)
    assert 2 == len(s.schedule(0).work)
    s.complete(first, answer(first), 0)
    # Both need a block now. Only preempting the other could free one, and the other is in flight.
    assert not s.schedule(0).work


def test_a_policy_that_learns_is_told_the_time_since_the_iteration_before():
    heard = []

    class Learning(Sarathi):
        def learn(self, plan, requests, now):
            heard.append(now - plan.now)

    s, _, first = begun(Learning(512))
    ahead = s.schedule(0.1)
    s.complete(first, answer(first), 2.0)
    s.complete(ahead, answer(ahead), 2.5)
    assert [2.0, 0.5] == heard


def test_the_first_token_in_flight_leaves_the_slo_policy_a_whole_gap():
    s = scheduler(policy="slo")
    s.submit(Request("a", range(10), 5))
    s.schedule(0)
    s.submit(Request("b", range(4000), 5))
    ahead = s.schedule(0)
    assert s.policy.slo.tbt.seconds == ahead.limit_s
    assert ["a", "b"] == [w.id for w in ahead.work]


def test_overlap_is_of_two_plans():
    with pytest.raises(ValueError, match="depth 2, not 3"):
        Capacity(16, 10, 100, depth=3, overlap=True)


@pytest.mark.parametrize("policy", names())
@pytest.mark.parametrize("blocks", [14, 1000])
def test_everybody_gets_the_same_tokens_with_and_without(policy, blocks):
    def served(capacity):
        s = scheduler(capacity, policy, max_seqs=6)
        requests = [
            Request(str(i), [i % 3] * 30 + [i] * (7 * i % 40), 5 + 3 * i % 20, stop_ids=frozenset({40 + 2 * i})) for i in range(20)
        ]
        out = []
        for request in requests:
            s.submit(request)
        while s.ledger.requests or out:
            while len(out) < capacity.depth and (plan := s.schedule(0)).work:
                out.append(plan)
            plan = out.pop(0)
            s.complete(plan, answer(plan), 0)
            s.ledger.check()
        return [(r.output, r.finish_reason) for r in requests]

    capacity = Capacity(8, blocks, 100)
    assert served(capacity) == served(replace(capacity, depth=2, overlap=True))


def test_a_constrained_request_is_never_planned_ahead_and_others_are():
    s = scheduler()
    requests = [Request("free", range(10), 5), Request("held", range(20, 30), 5, constrained=True)]
    for request in requests:
        s.submit(request)
    first = s.schedule(0)
    ahead = s.schedule(0)
    assert ["free"] == [w.id for w in ahead.work]
    s.complete(first, answer(first), 1)
    s.complete(ahead, answer(ahead), 2)
    assert ["free", "held"] == sorted(w.id for w in s.schedule(2).work)


def test_a_constrained_request_may_end_before_its_least_number_of_tokens():
    for constrained in (False, True):
        s, request, first = begun(stop_ids=frozenset({10}), min_tokens=3, constrained=constrained)
        s.complete(first, answer(first), 1)
        assert ("stop" if constrained else None) == request.finish_reason
