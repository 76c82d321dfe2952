"""Tenants' credits: who waited is not overtaken, who was idle has no claim, and the gap between two that wait is bounded."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stallfree.core.plan import Capacity, StepResult
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.core.slo import Slo as Targets
from stallfree.perf.fitted import Fitted
from stallfree.policies.slo import Slo
from stallfree.qos import prices
from stallfree.qos.credits import MOST_TENANTS, Credits


def bill(credits: Credits, tenant: str, seconds: float, weight: float = 1.0) -> Request:
    request = Request(tenant, [1], 1, tenant=tenant, weight=weight)
    credits.bill(request, seconds)
    return request


def test_a_tenant_has_credit_until_it_is_a_window_ahead():
    credits = Credits(window_s=0.5)
    credits.wait({"a", "b"})
    bill(credits, "a", 0.5)
    assert credits.has("a")
    bill(credits, "a", 0.1)
    assert not credits.has("a")
    assert credits.has("b")
    bill(credits, "b", 0.2)
    assert credits.has("a")


def test_service_counts_by_weight():
    credits = Credits()
    credits.wait({"a", "b"})
    bill(credits, "a", 3.0, weight=3.0)
    bill(credits, "b", 1.0)
    assert 0 == pytest.approx(credits.ahead("a")) == credits.ahead("b")


def test_a_tenant_that_was_idle_begins_at_the_least_of_the_others():
    credits = Credits()
    credits.wait({"a"})
    bill(credits, "a", 100.0)
    credits.wait({"a", "new"})
    assert 0 == credits.ahead("new") == credits.ahead("a")


def test_a_tenant_that_asked_for_less_keeps_a_small_claim_only():
    credits = Credits()
    credits.wait({"a", "modest"})
    bill(credits, "modest", 0.1)
    credits.wait({"a"})
    bill(credits, "a", 100.0)
    credits.wait({"a", "modest"})
    assert 0 == credits.ahead("modest")
    assert 4.0 == pytest.approx(credits.ahead("a"))


def test_a_parked_tenant_keeps_its_claim_and_the_others_are_not_compared_with_it():
    credits = Credits()
    credits.wait({"a", "b"}, {"parked"})
    bill(credits, "a", 3.0)
    bill(credits, "b", 2.9)
    assert credits.has("a")
    credits.wait({"a", "b", "parked"})
    assert not credits.has("b")
    assert credits.has("parked")


def test_a_tenant_that_begins_while_all_others_are_parked_has_no_claim_to_their_time():
    credits = Credits()
    credits.wait({"a"})
    bill(credits, "a", 3.0)
    credits.wait(set(), {"a"})
    credits.wait({"new"}, {"a"})
    assert credits.ahead("new") == pytest.approx(credits.ahead("a"))


def test_a_bill_is_corrected_by_what_was_used():
    credits = Credits()
    credits.wait({"a", "b"})
    request = bill(credits, "a", 5.0)
    credits.bill(request, 2.0)
    assert 5.0 == credits.ahead("a")
    credits.correct(request, 1.0)
    credits.close(request)
    assert 1.0 == pytest.approx(credits.ahead("a"))
    assert not credits.billed


def test_tenants_without_requests_are_forgotten_in_the_end():
    credits = Credits()
    for number in range(5 * MOST_TENANTS):
        credits.wait({str(number)})
        credits.close(bill(credits, str(number), 0.01))
    assert len(credits._served) <= MOST_TENANTS + 1


@settings(max_examples=30, deadline=None)
@given(
    weight=st.sampled_from([1.0, 2.0, 3.5]),
    lengths=st.tuples(*[st.integers(1, 1500)] * 2),
    answers=st.tuples(*[st.integers(1, 200)] * 2),
    seed=st.integers(0, 9),
)
def test_the_gap_between_two_tenants_that_wait_is_bounded(weight, lengths, answers, seed):
    """The bound of docs/decisions/0021: a window, and what the requests that run at once can take."""
    policy = Slo(Targets.parse("tbt=500ms"), Fitted())
    scheduler = Scheduler(policy, Capacity(16, 400, 4096))
    sides = [("a", lengths[0], answers[0], 1.0), ("b", lengths[1], answers[1], weight)]
    alive: list[Request] = []
    ended = {"a": 0.0, "b": 0.0}
    numbers = iter(range(10**6))
    now, most = 0.0, 0.0
    gaps: list[list[float]] = [[]]
    for _ in range(300):
        for tenant, length, answer, own in sides:
            while sum(r.tenant == tenant and r.ticket != 0 for r in alive) < 3:
                number = next(numbers)
                prompt = range(10_000 * number, 10_000 * number + max(1, (length * (1 + (number + seed) % 3)) // 3))
                request = Request(str(number), prompt, answer, arrival=now, tenant=tenant, weight=own)
                scheduler.submit(request)
                alive.append(request)
        plan = scheduler.schedule(now)
        if {"a", "b"} != {r.tenant for r in alive if r.ticket}:
            gaps.append([])  # one of them has all that it wants
        now += policy.cost.seconds(plan.shape)
        scheduler.complete(plan, StepResult(plan.step, {w.id: (1,) for w in plan.work if w.samples}, 0.0), now)
        for r in [r for r in alive if r.finish_reason is not None]:
            alive.remove(r)
            ended[r.tenant] += prices.used(policy.cost, r)
        running = [r for r in alive if r.blocks]
        served = {
            tenant: (ended[tenant] + sum(prices.used(policy.cost, r) for r in running if r.tenant == tenant)) / own
            for tenant, _, _, own in sides
        }
        gaps[-1].append(served["a"] - served["b"])
        whole = sum(prices.expected(policy.cost, r, 0, r.max_tokens) / r.weight for r in alive)
        most = max(most, whole)
    bound = policy.credits.window_s + most
    assert all(max(between) - min(between) <= 2 * bound for between in gaps if between)
