"""The scheduler's promises, which hold under every policy."""

from dataclasses import replace

import pytest

from stallfree.core import transfer
from stallfree.core.leap import Stretch
from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity, StepResult
from stallfree.core.request import Refused, Request
from stallfree.core.scheduler import Scheduler
from stallfree.policies.sarathi import Sarathi
from tests.virtual import answer, run

ROOMY = Capacity(block_size=16, num_blocks=1000, max_model_len=4096)


def scheduler(budget=64, capacity=ROOMY, **limits):
    return Scheduler(Sarathi(budget), capacity, Limits(**limits))


def step(s, now=0.0):
    plan = s.schedule(now)
    done, _ = s.complete(plan, answer(plan), now)
    s.ledger.check()
    return plan, done


def test_a_prompt_is_cut_into_chunks_of_the_budget():
    s = scheduler()
    s.submit(Request("a", range(150), 2))
    assert [[(0, 64)], [(64, 64)], [(128, 22)], [(150, 1)]] == [step(s)[0].shape for _ in range(4)]


def test_a_decode_shares_the_iteration_with_a_chunk():
    s = scheduler()
    s.submit(Request("a", range(10), 5))
    step(s)
    s.submit(Request("b", range(1000, 1200), 5))
    assert [(10, 1), (0, 63)] == step(s)[0].shape


def test_a_request_ends_at_max_tokens():
    s = scheduler()
    s.submit(Request("a", range(10), 3))
    for _ in range(2):
        step(s)
    (done,) = step(s)[1]
    assert ("length", [10, 11, 12]) == (done.finish_reason, done.output)


def test_a_stop_id_ends_a_request_once_min_tokens_are_out():
    s = scheduler()
    request = Request("a", range(10), 9, stop_ids=frozenset({11, 13}), min_tokens=2)
    s.submit(request)
    while s.ledger.requests:
        step(s)
    assert ("stop", [10, 11, 12, 13]) == (request.finish_reason, request.output)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "field"),
    [(range(0), 1, "prompt"), (range(5), 0, "max_tokens"), (range(5), -1, "max_tokens"), (range(4096), 1, "prompt"),
     (range(4000), 97, "max_tokens")],
)  # fmt: skip
def test_what_can_never_be_served_is_refused_and_named(prompt, max_tokens, field):
    s = scheduler()
    with pytest.raises(Refused) as refusal:
        s.submit(Request("a", prompt, max_tokens))
    assert field == refusal.value.field
    assert not s.ledger.requests


def test_a_prompt_beyond_the_whole_kv_cache_is_refused():
    s = scheduler(capacity=Capacity(16, 10, 4096))
    with pytest.raises(Refused, match="KV cache 160 tokens"):
        s.submit(Request("a", range(161), 1))


def test_an_id_in_use_is_refused():
    s = scheduler()
    s.submit(Request("a", range(5), 1))
    with pytest.raises(Refused, match="'a' is already in use"):
        s.submit(Request("a", range(5), 1))


def test_lower_priority_numbers_are_served_first():
    s = scheduler(budget=8)
    s.submit(Request("late", range(8), 1, priority=1))
    s.submit(Request("soon", range(8, 16), 1, priority=0))
    assert ["soon", "late"] == [step(s)[0].work[0].id for _ in range(2)]


def test_an_aborted_request_frees_its_blocks_at_once():
    s = scheduler()
    s.submit(Request("a", range(100), 9))
    step(s)
    s.abort("a")
    assert ROOMY.num_blocks == s.ledger.pool.num_free
    assert s.abort("a") is None


def test_a_result_for_an_aborted_request_is_ignored():
    s = scheduler()
    request = Request("a", range(10), 9)
    s.submit(request)
    plan = s.schedule(0)
    s.abort("a")
    assert ([], ["a"]) == s.complete(plan, answer(plan), 0)
    assert [] == request.output
    s.ledger.check()


def test_an_executor_error_fails_the_requests_of_that_iteration_only():
    s = scheduler(budget=10)
    hit, spared = Request("hit", range(10), 9), Request("spared", range(100, 110), 1)
    s.submit(hit)
    s.submit(spared)
    plan = s.schedule(0)
    assert ([hit], []) == s.complete(plan, StepResult(plan.step, {}, 0, error="out of memory"), 0)
    step(s)
    assert ("error", "length") == (hit.finish_reason, spared.finish_reason)


def test_one_failed_request_fails_alone():
    s = scheduler()
    bad, good = Request("bad", range(10), 1), Request("good", range(100, 110), 1)
    s.submit(bad)
    s.submit(good)
    plan = s.schedule(0)
    s.complete(plan, StepResult(plan.step, {"good": (7,)}, 0, failed={"bad": "NaN"}), 0)
    assert ("error", "length") == (bad.finish_reason, good.finish_reason)


def test_a_leap_is_of_one_stretch_and_no_further_than_it():
    s = scheduler()
    s.submit(Request("a", range(20), 9))
    step(s)
    stretch = Stretch(s, 0, 5)
    with pytest.raises(ValueError, match="complete them first"):
        s.schedule(0)
    with pytest.raises(ValueError, match="cannot leap over 6 steps"):
        stretch.leap(6, [range(6)], 0)
    stretch.leap(3, [range(3)], 0)
    assert (4, [0, 1, 2]) == (s.step, s.ledger.requests["a"].output[1:])


def test_a_policy_that_raises_leaves_no_draft_open():
    class Failing(Sarathi):
        def plan(self, draft):
            raise KeyError("a mistake")

    s = Scheduler(Failing(64), ROOMY)
    for _ in range(2):
        with pytest.raises(KeyError, match="a mistake"):
            s.schedule(0)


def test_a_stretch_is_not_begun_while_a_plan_is_in_flight():
    s = scheduler()
    s.submit(Request("a", range(20), 9))
    s.schedule(0)
    with pytest.raises(ValueError, match="no plan in flight"):
        Stretch(s, 0, 5)


def test_results_must_come_in_order():
    s = Scheduler(Sarathi(8), Capacity(16, 100, 4096, depth=2))
    s.submit(Request("a", range(16), 1))
    first, second = s.schedule(0), s.schedule(0)
    with pytest.raises(ValueError, match="not the oldest"):
        s.complete(second, answer(second), 0)
    s.complete(first, answer(first), 0)


def test_short_kv_preempts_the_last_arrival_which_recomputes_to_the_same_tokens():
    small = Capacity(block_size=4, num_blocks=12, max_model_len=48)
    requests = [Request(str(i), range(100 * i, 100 * i + 12), 16, arrival=i * 1e-6) for i in range(3)]
    records = run(Sarathi(16), requests, small)
    assert sum(len(r.preempted) for r in records) > 0
    assert 0 == requests[0].num_preemptions
    assert [list(range(12, 28))] * 3 == [r.output for r in requests]


def test_equal_prefixes_share_blocks_and_skip_their_prefill():
    s = scheduler(budget=512)
    first = Request("a", range(100), 3)
    s.submit(first)
    step(s)
    second = Request("b", [*range(96), 7, 7], 1)
    s.submit(second)
    plan, _ = step(s)
    assert (("b", 96),) == plan.cached
    assert [(100, 1), (96, 2)] == plan.shape
    assert first.blocks[:6] == list(plan.work[1].blocks[:6])


def test_a_prompt_found_whole_in_the_cache_still_computes_its_last_token():
    s = scheduler(budget=512)
    for id in "ab":
        s.submit(Request(id, range(32), 1))
        plan, _ = step(s)
    assert [(16, 16)] == plan.shape


def test_adapters_do_not_share_prefixes():
    s = scheduler(budget=512)
    adapters = s.ledger.adapters
    for adapter in ("x", "y"):
        adapters.known[adapter] = 1, 8
        s.submit(Request(adapter, range(32), 1, adapter=adapter))
        adapters.loaded(adapters.next(0).key)
        plan, _ = step(s)
        assert [(8, -1), (0, 32)] == plan.shape


def test_an_evicted_prefix_is_never_found_again():
    s = Scheduler(Sarathi(64), Capacity(block_size=4, num_blocks=8, max_model_len=32))
    for start in (0, 1000, 2000, 0):
        s.submit(Request(str(start), range(start, start + 20), 1))
        plan, _ = step(s)
        assert [(0, 20)] == plan.shape


def test_a_released_request_continues_elsewhere_with_the_same_tokens():
    source, target = scheduler(), scheduler()
    request = Request("a", range(20), 5)
    source.submit(request)
    for _ in range(2):
        step(source)
    transfer.hold(source.ledger, "a")
    assert request is transfer.release(source.ledger, "a")
    source.ledger.check()
    twin = Request("a", range(20), 5)
    transfer.expect(target.ledger, twin)
    assert twin is transfer.admit(target.ledger)
    assert transfer.deliver(target.ledger, twin, request.output[0], 0) is None
    while target.ledger.requests:
        step(target)
    assert [20, 21, 22, 23, 24] == twin.output


def test_admitting_the_expected_without_room_changes_nothing():
    s = scheduler(max_seqs=1)
    s.submit(Request("here", range(20), 5))
    step(s)
    transfer.expect(s.ledger, Request("expected", range(20), 5))
    assert transfer.admit(s.ledger) is None
    assert ["expected"] == [r.id for r in s.ledger.expected]
    s.ledger.check()


def test_only_a_running_request_that_is_not_in_flight_is_held():
    s = scheduler()
    s.submit(Request("a", range(20), 5))
    with pytest.raises(ValueError, match="can be held"):
        transfer.hold(s.ledger, "a")


def test_100_000_aborted_requests_leave_no_trace_in_the_queue():
    s = scheduler()
    for i in range(100_000):
        s.submit(Request(str(i), range(8), 1))
    for i in range(100_000):
        s.abort(str(i))
    s.ledger.check()
    assert 0 == len(s.ledger.queue)
    assert not s.schedule(0).work


def test_requests_that_a_policy_passes_over_keep_their_place():
    class SkipsFirst:
        reserve, stall_free = "prompt", True

        def plan(self, draft):
            for r in draft.waiting:
                if r.id != "a" or draft.now:
                    draft.admit(r)

    s = Scheduler(SkipsFirst(), ROOMY)
    for id in "abc":
        s.submit(Request(id, range(8), 1))
    assert [["b", "c"], ["a"]] == [[w.id for w in step(s, now)[0].work] for now in (0, 1)]


def test_limits_leave_room_for_every_decode():
    with pytest.raises(ValueError, match="every ready decode"):
        Limits(max_seqs=10, max_tokens=9)


def test_a_plan_without_work_preempts_nobody_and_takes_no_step():
    s = scheduler()
    assert [(0, ())] * 2 == [(plan.step, plan.work) for plan in (s.schedule(0), s.schedule(1))]
    # Both requests need a block, and there is none; the one to be preempted is in flight, so nothing can be planned.
    s = Scheduler(Sarathi(64), Capacity(4, 6, 24, depth=2, overlap=True))
    requests = [Request(id, range(start, start + 11), 9) for id, start in (("a", 0), ("b", 100))]
    for request in requests:
        s.submit(request)
    plans = [s.schedule(0), s.schedule(0)]
    s.complete(plans[0], answer(plans[0]), 0)
    empty = s.schedule(0)
    assert ((), ()) == (empty.work, empty.preempted)
    assert [0, 0] == [request.num_preemptions for request in requests]
    s.complete(plans[1], answer(plans[1]), 0)
    assert empty.step == s.schedule(0).step == 2


def test_a_waiting_request_that_is_aborted_never_runs():
    s = scheduler(budget=8)
    s.submit(Request("a", range(8), 2))
    s.submit(Request("b", range(50, 58), 2))
    step(s)
    s.abort("b")
    while s.ledger.requests:
        plan, _ = step(s)
        assert ["a"] == [w.id for w in plan.work]


def test_a_scored_request_takes_no_cached_prefix_and_small_chunks():
    s = Scheduler(Sarathi(1000), Capacity(4, 500, 2000))
    plain, scored = Request("plain", range(400), 1), Request("scored", range(400), 1, scored=True)
    s.submit(plain)
    plan = s.schedule(0)
    s.complete(plan, answer(plan), 1)
    s.submit(scored)
    counts = []
    while s.ledger.requests:
        plan = s.schedule(0)
        counts += [w.count for w in plan.work]
        s.complete(plan, answer(plan), 1)
    assert [128, 128, 128, 16] == counts


def test_a_deferred_request_gets_its_token_in_a_later_iteration():
    s = Scheduler(Sarathi(64), Capacity(4, 50, 200))
    held, free = Request("held", range(16), 6), Request("free", range(50, 60), 6)
    s.submit(held)
    s.submit(free)
    steps = 0
    while s.ledger.requests:
        plan = s.schedule(0)
        result = answer(plan)
        late = steps % 3 != 2 and any(w.id == "held" and w.samples for w in plan.work)
        if late:
            result = replace(result, tokens={id: t for id, t in result.tokens.items() if id != "held"}, deferred=("held",))
        s.complete(plan, result, 1)
        s.ledger.check()
        steps += 1
    assert list(range(16, 22)) == held.output
    assert list(range(10, 16)) == free.output
    assert steps > 12
