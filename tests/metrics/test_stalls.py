"""Which requests stalled or were late, in which iteration, and because of whom, in small runs with obvious answers."""

import pytest

from stallfree.core.plan import Capacity
from stallfree.core.record import Arrived, Finished, StepRecord
from stallfree.core.request import Request
from stallfree.core.slo import Slo
from stallfree.metrics.stalls import Iteration, StallAccount
from stallfree.metrics.timeline import timelines
from stallfree.policies import load
from tests.virtual import run

TBT = Slo.parse("tbt=100ms")
DECODE = [("a", 10, 1)]
WITH_PREFILL = [("a", 10, 1), ("b", 0, 64), ("c", 0, 32)]


def arrived(id: str, slo: str = "", arrival: float = 0.0) -> Arrived:
    return Arrived(id, arrival, 10, 100, 0, slo)


def step(number: int, t_start: float, t_end: float, work=(), **fields) -> StepRecord:
    """An iteration; the request "a", with a prompt of 10 tokens, arrives in number 0 and gets a token unless told otherwise."""
    values = {
        "emitted": ["a"], "cached": [], "arrived": [arrived("a")] if number == 0 else [], "finished": [], "preempted": [],
        "stalled": [], "num_running": 1, "num_waiting": 0, "free_blocks": 9, "budget": 512, "reason": "",
    }  # fmt: skip
    return StepRecord(number, t_start, t_start, t_end, list(work), **values | fields)


FIRST = step(0, 0.0, 0.02, [("a", 0, 10)])


def judge(steps: list[StepRecord], slo: Slo | None = TBT):
    account = StallAccount(slo)
    return [stall for record in steps for stall in account.record(record)]


def test_a_token_in_time_is_no_stall():
    assert [] == judge([FIRST, step(1, 0.02, 0.12, DECODE)])


def test_a_token_after_a_long_iteration_with_prefill_is_late_through_the_largest_prefill():
    (stall,) = judge([FIRST, step(1, 0.02, 0.15, WITH_PREFILL)])
    assert ("a", 1, "late", "prefill") == (stall.id, stall.step, stall.kind, stall.cause)
    assert (("b", 64), ("c", 32)) == stall.culprits
    assert pytest.approx((0.13, 0.03)) == (stall.gap_s, stall.late_s)
    assert "step 1 took 130 ms for 1 decode and 96 prefill tokens of b and 1 more" == stall.words()


def test_a_token_after_a_long_iteration_of_decodes_is_late_through_them():
    (stall,) = judge([FIRST, step(1, 0.02, 0.15, [("a", 10, 1), ("b", 30, 1)], arrived=[arrived("b")])])
    assert ("decodes", ()) == (stall.cause, stall.culprits)
    assert "step 1 took 130 ms for 2 decodes" == stall.words()


def test_time_lost_between_iterations_is_unexpected():
    (stall,) = judge([FIRST, step(1, 0.10, 0.15, WITH_PREFILL)])
    assert ("unexpected", ()) == (stall.cause, stall.culprits)
    assert "the rest of the time passed between iterations" in stall.words()


def test_an_iteration_without_a_limit_is_at_fault_from_nine_tenths_of_the_target_on():
    assert ["prefill"] == [stall.cause for stall in judge([FIRST, step(1, 0.03, 0.125, WITH_PREFILL)])]
    assert ["unexpected"] == [stall.cause for stall in judge([FIRST, step(1, 0.03, 0.125, WITH_PREFILL, limit_s=0.096)])]


def test_an_iteration_over_its_own_limit_is_at_fault_even_if_within_the_target():
    (stall,) = judge([FIRST, step(1, 0.05, 0.13, WITH_PREFILL, limit_s=0.05)])
    assert "prefill" == stall.cause


def test_a_decode_that_is_left_out_is_a_stall_through_the_prefill_in_its_place():
    (stall,) = judge([FIRST, step(1, 0.02, 0.08, [("b", 0, 64)], emitted=[], stalled=["a"])], slo=None)
    assert ("a", 1, "left out", "prefill", 0.0) == (stall.id, stall.step, stall.kind, stall.cause, stall.late_s)
    assert (("b", 64),) == stall.culprits
    assert pytest.approx(0.06) == stall.gap_s
    assert "left out of step 1, which took 60 ms for 64 prefill tokens of b" == stall.words()


def test_a_decode_that_is_left_out_beside_decodes_waits_for_no_prefill():
    (stall,) = judge([FIRST, step(1, 0.02, 0.04, [("b", 30, 1)], arrived=[arrived("b")], emitted=["b"], stalled=["a"])])
    assert ("left out", ()) == (stall.cause, stall.culprits)


def test_a_late_token_names_the_longest_iteration_that_left_it_out():
    short = step(1, 0.02, 0.04, [("c", 0, 8)], emitted=[], stalled=["a"])
    long = step(2, 0.04, 0.14, [("b", 0, 64)], emitted=[], stalled=["a"])
    *_, late = judge([FIRST, short, long, step(3, 0.14, 0.16, DECODE)])
    assert ("late", "left out", 3, 2) == (late.kind, late.cause, late.step, late.blamed.step)
    assert (("b", 64),) == late.culprits
    assert "left out of step 2, which took 100 ms for 64 prefill tokens of b" == late.words()


def test_a_token_late_after_a_preemption_is_late_through_it():
    preempted = step(1, 0.02, 0.06, [("b", 0, 64)], emitted=[], preempted=["a"])
    (stall,) = judge([FIRST, preempted, step(2, 0.06, 0.18, [("a", 0, 11)])])
    assert ("preempted", 1, ()) == (stall.cause, stall.blamed.step, stall.culprits)
    assert "preempted in step 1; its KV was computed again" == stall.words()


def test_without_a_target_nothing_is_late():
    assert [] == judge([FIRST, step(1, 0.02, 9.0, WITH_PREFILL)], slo=None)


@pytest.mark.parametrize(("own", "late"), [("tbt=200ms", 0), ("tbt=50ms", 1), ("tpot=200ms", 0), ("ttft=1s", 1)])
def test_a_request_is_judged_by_its_own_targets_where_it_has_some(own, late):
    first = step(0, 0.0, 0.02, [("a", 0, 10)], arrived=[arrived("a", own)])
    assert late == len(judge([first, step(1, 0.02, 0.15, DECODE)]))


def test_an_envelope_forgives_a_gap_that_early_tokens_have_paid_for():
    steps = [FIRST, step(1, 0.02, 0.04, DECODE), step(2, 0.04, 0.20, WITH_PREFILL)]  # due at 0.12 and 0.22
    assert [] == judge(steps, Slo.parse("tpot=100ms"))
    assert [2] == [stall.step for stall in judge(steps, TBT)]


def test_an_envelope_begins_when_the_first_token_was_due():
    steps = [FIRST, step(1, 0.02, 0.55, WITH_PREFILL), step(2, 0.55, 0.75, WITH_PREFILL)]  # due at 0.6 and 0.7
    assert [2] == [stall.step for stall in judge(steps, Slo.parse("ttft=500ms,tpot=100ms"))]


def test_tokens_that_are_still_behind_their_envelope_blame_the_iteration_that_put_them_there():
    steps = [FIRST, step(1, 0.02, 0.32, WITH_PREFILL), step(2, 0.32, 0.34, DECODE), step(3, 0.34, 0.36, DECODE)]
    stalls = judge(steps, Slo.parse("tpot=100ms"))  # due at 0.12, 0.22 and 0.32
    assert [(1, 1), (2, 1), (3, 1)] == [(stall.step, stall.blamed.step) for stall in stalls]
    assert {"prefill"} == {stall.cause for stall in stalls}


def test_only_a_request_s_first_token_has_a_ttft_and_only_those_after_it_a_gap():
    account = StallAccount()
    both = [arrived("a", arrival=0.25), arrived("old")]  # as one that another engine began
    account.record(step(5, 0.5, 0.75, [("a", 0, 10), ("old", 12, 1)], arrived=both, emitted=["a", "old"]))
    assert ([0.5], []) == (account.ttfts, account.gaps)
    account.record(step(6, 0.75, 1.0, [("a", 10, 1), ("old", 13, 1)], emitted=["a", "old"]))
    assert ([], [0.25, 0.25]) == (account.ttfts, account.gaps)


def test_those_who_have_ended_or_are_unknown_are_not_judged():
    end = step(1, 0.02, 0.04, DECODE, finished=[Finished("a", "abort")])
    assert [] == judge([FIRST, end, step(2, 0.04, 9.0, DECODE, emitted=["a", "x"], stalled=["y"], preempted=["z"])])


def test_an_iteration_tells_decodes_from_the_last_token_of_a_prompt_and_from_computing_again():
    account = StallAccount()
    names = [arrived(id) for id in "abc"]
    account.record(step(0, 0.0, 0.5, [("a", 10, 1), ("b", 9, 1), ("c", 4, 9)], arrived=names, emitted=[]))
    assert Iteration(0, 0.5, 1, (("c", 9), ("b", 1))) == account.iteration


@pytest.mark.parametrize("policy", ["sarathi", "prefill-first", "orca", "chunked-only"])
def test_whole_runs_have_as_many_stalls_and_late_tokens_as_their_timelines_say(policy):
    requests = [Request("a", range(10), 40), Request("b", range(100, 110), 40), Request("long", range(1000, 2000), 2, arrival=0.1)]
    records = run(load(policy), requests, Capacity(16, 1000, 4096))
    lines = timelines(records).values()
    expected = sum(line.stalls for line in lines), sum(gap > 0.1 for line in lines for gap in line.gaps)
    stalls = judge(records)
    assert expected == tuple(sum(s.kind == kind for s in stalls) for kind in ("left out", "late"))
    assert ({"long"} if sum(expected) else set()) == {stall.culprits[0][0] for stall in stalls}
    assert (policy != "sarathi") == (sum(expected) > 0)


def test_a_long_wait_says_how_many_iterations_held_no_prefill_and_why():
    lone = [("a", 10, 1)]
    steps = [
        FIRST,
        step(1, 0.02, 0.06, lone, arrived=[arrived("b", arrival=0.02)], reason="99 ms until a is due"),
        step(2, 0.06, 0.10, [*lone, ("b", 0, 5)]),
        step(3, 0.10, 12.0, lone, reason="one more stream would be too many"),
        step(4, 12.0, 12.1, [*lone, ("b", 5, 5)], emitted=["a", "b"]),
    ]
    account = StallAccount(TBT)
    for record in steps:
        account.record(record)
    (wait,) = account.waits
    assert ("b", 4, 12.08, 4, 2) == (wait.id, wait.step, pytest.approx(wait.seconds), wait.iterations, wait.unserved)
    assert "2 of the 4 iterations until then held no prefill at all; the last: one more stream" in wait.words()


@pytest.mark.parametrize(("ttlt", "reason", "late"), [("1s", "length", 0), ("100ms", "length", 1), ("1s", "error", 1)])
def test_under_a_target_for_the_last_token_only_that_one_is_judged(ttlt, reason, late):
    account = StallAccount(TBT)
    account.record(step(0, 0.0, 0.02, [("a", 0, 10)], arrived=[arrived("a", f"ttlt={ttlt}")]))
    assert [] == account.record(step(1, 0.02, 0.5, DECODE, finished=[Finished("a", reason)]))
    assert (1, late) == (account.due["ttlt"], account.late["ttlt"])
    assert (not late, 0) == (account.ended[0].in_time, account.ended[0].judged_tokens)


def test_who_left_has_met_and_missed_no_target_for_the_last_token():
    account = StallAccount(Slo.parse("ttlt=1s"))
    account.record(FIRST)
    account.record(step(1, 0.02, 0.5, DECODE, finished=[Finished("a", "abort")]))
    assert (0, None) == (account.due["ttlt"], account.ended[0].in_time)


def test_a_wait_within_the_target_for_the_last_token_is_not_long():
    account = StallAccount(Slo.parse("ttlt=60s"))
    account.record(step(0, 0.0, 20.0, [("a", 0, 10)]))
    assert [] == account.waits


def test_a_request_that_ended_says_whose_it_was_and_in_which_class():
    account = StallAccount(TBT)
    account.record(
        step(0, 0.0, 0.02, [("a", 0, 10)], arrived=[arrived("a")], tenants=[("a", "acme", 3.0)], classes=[("a", "chat")])
    )
    account.record(step(1, 0.02, 0.5, DECODE, finished=[Finished("a", "length")]))
    (ended,) = account.ended
    assert ("acme", "chat", 1, 1) == (ended.tenant, ended.service_class, ended.judged_tokens, ended.late_tokens)


def test_a_forecast_is_compared_with_what_came():
    account = StallAccount()
    account.record(step(0, 0.0, 0.5, [("a", 0, 10)], arrived=[arrived("a")], predicted=[("a", 0.25)]))
    assert [2.0] == account.forecasts
    account.record(step(1, 0.5, 0.6, DECODE))
    assert [] == account.forecasts
