"""The slo policy keeps its target whatever the load, uses its slack, and bears one client's impatience. In virtual time."""

import random
from collections.abc import Callable

import pytest

from stallfree.core.plan import Capacity, Plan, Shape, StepResult
from stallfree.core.policy import Setup
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.core.slo import Slo as Targets
from stallfree.core.transfer import admit, deliver, expect, hold, release, resume
from stallfree.perf.fitted import Fitted
from stallfree.policies import load
from stallfree.policies.slo import Slo
from stallfree.qos import prices

TARGET_S = 0.1


def seconds(plan: Plan, noise: random.Random) -> float:
    """Noisy, and not what the policy's cost model starts from: one iteration in a hundred takes half as long again."""
    exact = 0.009 + sum(0.0012 + 1.2e-6 * w.start if w.decode else 0.0004 * w.count + 2e-8 * w.count * w.start for w in plan.work)
    return exact * noise.lognormvariate(0, 0.05) * (1.5 if noise.random() < 0.01 else 1)


def gaps(policy: Slo, requests: list[Request], slowdown: float = 1.0) -> list[float]:
    """Every gap between tokens, in the order in which they ended; after half of the requests all takes `slowdown` times as long."""
    scheduler, noise, now = Scheduler(policy, Capacity(32, 4000, 4096)), random.Random(5), 0.0
    coming, between = requests[::-1], []
    while coming or scheduler.ledger.requests:
        while coming and coming[-1].arrival <= now:
            scheduler.submit(coming.pop())
        plan = scheduler.schedule(now)
        if not plan.work:
            now = coming[-1].arrival
            continue
        before = {w.id: scheduler.ledger.requests[w.id].last_token for w in plan.work if w.decode}
        now += seconds(plan, noise) * (slowdown if len(coming) < len(requests) / 2 else 1)
        scheduler.complete(plan, StepResult(plan.step, {w.id: (1,) for w in plan.work if w.samples}, 0.0), now)
        between += [now - last for last in before.values()]
        now += 0.0008
    return between


def chat(rate: float, count: int = 250) -> list[Request]:
    """Poisson arrivals; one prompt in twenty is long."""
    rng, now, requests = random.Random(1), 0.0, []
    for i in range(count):
        now += rng.expovariate(rate)
        length = 2000 if rng.random() < 0.05 else min(1500, int(rng.lognormvariate(5.3, 1)) + 4)
        requests.append(Request(f"r{i}", range(100_000 * i, 100_000 * i + length), rng.randint(2, 160), arrival=now))
    return requests


@pytest.mark.parametrize("rate", [0.5, 1.5, 2.5, 4.0])
def test_late_tokens_stay_within_the_share_allowed_at_every_load(rate):
    measured = gaps(Slo(Targets.parse("tbt=100ms@p99")), chat(rate))
    assert sum(gap > TARGET_S for gap in measured) <= 0.01 * len(measured)


def test_a_machine_too_slow_for_any_stream_serves_everybody_to_the_end():
    measured = gaps(Slo(Targets.parse("tbt=25ms@p99")), chat(1.5, count=40), slowdown=20)
    assert sum(max(1, r.max_tokens) - 1 for r in chat(1.5, count=40)) == len(measured)


def crowd(slo: Targets | None) -> int:
    """How many of 20 short prompts that come at once are decoding a while later."""
    scheduler, now = Scheduler(Slo(Targets.parse("tbt=25ms")), Capacity(32, 4000, 4096)), 0.0
    for i in range(20):
        scheduler.submit(Request(f"r{i}", range(100 * i, 100 * i + 4), 500, slo=slo))
    for _ in range(100):
        plan = scheduler.schedule(now)
        now += seconds(plan, random.Random(0))
        scheduler.complete(plan, StepResult(plan.step, {w.id: (1,) for w in plan.work if w.samples}, 0.0), now)
    return len(scheduler.ledger.running)


def test_no_more_requests_come_in_than_decode_within_the_target():
    assert 4 <= crowd(None) <= (0.025 - 0.009) / 0.0012


def test_requests_that_ask_for_less_than_the_server_promises_may_be_more():
    assert 20 == crowd(Targets.parse("tbt=200ms"))


def test_near_saturation_the_slack_is_used():
    measured = sorted(gaps(Slo(Targets.parse("tbt=100ms@p90")), chat(4.0)))
    assert measured[int(0.95 * len(measured))] > 0.9 * TARGET_S
    assert sum(gap > TARGET_S for gap in measured) >= 0.05 * len(measured)


def test_a_machine_that_turns_slow_is_followed():
    measured = gaps(Slo(Targets.parse("tbt=100ms@p99")), chat(1.0), slowdown=1.8)
    assert sum(gap > TARGET_S for gap in measured) <= 0.01 * len(measured)


def test_a_clients_own_impossible_target_does_not_shut_the_others_out():
    hasty = Request("hasty", range(50), 400, slo=Targets.parse("tbt=1ms"))
    others = [Request(f"o{i}", range(1000 * i, 1000 * i + 300), 5, arrival=0.2) for i in range(1, 6)]
    scheduler, now = Scheduler(Slo(Targets.parse("tbt=100ms")), Capacity(32, 4000, 4096)), 0.0
    for request in (hasty, *others):
        scheduler.submit(request)
    for _ in range(60):
        plan = scheduler.schedule(now)
        now += seconds(plan, random.Random(0))
        scheduler.complete(plan, StepResult(plan.step, {w.id: (1,) for w in plan.work if w.samples}, 0.0), now)
    assert [5] * 5 == [len(r.output) for r in others]
    assert "running" == hasty.status.value


def test_the_most_pressed_prompt_is_served_first():
    policy = Slo(Targets.parse("tbt=100ms"))
    scheduler = Scheduler(policy, Capacity(32, 4000, 4096))
    scheduler.submit(Request("stream", range(10), 100))
    first = scheduler.schedule(0.0)
    scheduler.complete(first, StepResult(0, {"stream": (1,)}, 0.0), 0.01)
    scheduler.submit(Request("long", range(10_000, 13_000), 10, arrival=0.0))
    scheduler.submit(Request("short", range(20_000, 20_030), 10, arrival=0.0))
    assert ["stream", "short", "long"] == [w.id for w in scheduler.schedule(0.02).work]


def test_under_an_envelope_early_tokens_bank_slack():
    scheduler = Scheduler(Slo(Targets.parse("tpot=100ms")), Capacity(32, 4000, 4096))
    scheduler.submit(Request("stream", range(10), 100))
    now, limits = 0.0, []
    for _ in range(5):
        plan = scheduler.schedule(now)
        limits.append(plan.limit_s)
        now += 0.01
        scheduler.complete(plan, StepResult(plan.step, {"stream": (1,)}, 0.0), now)
    assert None is limits[0]
    assert limits[1:] == sorted(limits[1:])
    assert limits[-1] > 0.3


def test_a_target_that_no_machine_like_this_meets_is_refused_with_what_could_be_met():
    with pytest.raises(ValueError, match=r"tbt=2ms cannot be met: .* about tbt=\d+ms"):
        load("slo", Setup(targets=Targets.parse("tbt=2ms")))


def cached_beside_a_stream(cached: int, *more: Request) -> tuple[Plan, Callable[[Shape], float]]:
    """A stream decodes; a prompt waits, `cached` tokens of it in the prefix cache and 3,000 not, and `more` wait too.

    The next plan, and the policy's prices.
    """
    policy = Slo(Targets.parse("tbt=100ms"))
    scheduler, cost, now = Scheduler(policy, Capacity(32, 4000, 8192)), Fitted(), 0.0

    def step() -> Plan:
        nonlocal now
        plan = scheduler.schedule(now)
        now += cost.seconds(plan.shape)
        scheduler.complete(plan, StepResult(plan.step, {w.id: (1,) for w in plan.work if w.samples}, 0.0), now)
        return plan

    scheduler.submit(Request("before", range(10_000, 14_000), 1))
    while scheduler.ledger.requests:
        step()
    scheduler.submit(Request("stream", range(10), 100))
    step()
    for request in (*more, Request("cached", [*range(10_000, 10_000 + cached), *range(50_000, 53_000)], 10, arrival=now)):
        scheduler.submit(request)
    return step(), policy.cost.seconds


@pytest.mark.parametrize("cached", [0, 1000, 1900, 3000, 3999])
def test_a_chunk_of_a_cached_prompt_is_priced_from_where_it_begins(cached):
    plan, seconds = cached_beside_a_stream(cached)
    assert [("stream", 10), ("cached", cached // 32 * 32)] == [(w.id, w.start) for w in plan.work]
    assert 0.05 <= seconds(plan.shape) <= 0.1


def test_of_two_waiting_prompts_the_one_that_is_mostly_cached_is_the_short_one():
    """4,000 tokens of which 3,968 are cached are served before 500 of which none is: both have waited equally long."""
    rest = [*range(10_000, 14_000)]
    plan, _ = cached_beside_a_stream(0, Request("new", range(70_000, 70_500), 10), Request("again", rest, 10))
    assert ["stream", "again", "new"] == [w.id for w in plan.work][:3]


def test_streams_whose_sampling_takes_long_leave_less_time_for_prefill():
    budgets = []
    for extra in (0, 3):
        scheduler, now = Scheduler(Slo(Targets.parse("tbt=100ms")), Capacity(32, 4000, 8192)), 0.0
        for i in range(16):
            scheduler.submit(Request(f"s{i}", range(100 * i, 100 * i + 10), 100, extra_rows=extra))
        while any(not r.output for r in scheduler.ledger.requests.values()):
            plan = scheduler.schedule(now)
            now += Fitted().seconds([*plan.shape, (extra * sum(w.samples for w in plan.work), 0)])
            scheduler.complete(plan, StepResult(plan.step, {w.id: (1,) for w in plan.work if w.samples}, 0.0), now)
        budgets.append(scheduler.schedule(now).budget)
    assert budgets[1] < budgets[0]


def test_a_request_that_goes_on_elsewhere_leaves_no_bill():
    policy = Slo("tbt=100ms", Fitted((0.011, 0.0042, 0.0025, 0.0025, 0.0002, 0.0005)))
    scheduler = Scheduler(policy, Capacity(16, 1000, 4000))
    for id, prompt in (("goes", 100), ("stays", 300)):
        scheduler.submit(Request(id, range(prompt), 9))
    for now in range(3):
        plan = scheduler.schedule(now)
        scheduler.complete(plan, StepResult(plan.step, {w.id: (7,) for w in plan.work if w.samples}, 0.1), now + 0.1)
    assert {"goes", "stays"} == {r.id for r in policy.credits.billed}
    hold(scheduler.ledger, "goes")
    release(scheduler.ledger, "goes")
    scheduler.schedule(3.0)
    assert {"stays"} == {r.id for r in policy.credits.billed}


@pytest.mark.parametrize("cut", [100, 900, 1000])
def test_a_request_from_elsewhere_is_billed_for_what_is_computed_here(cut):
    policy = Slo("tbt=100ms", Fitted((0.011, 0.0042, 0.0025, 0.0025, 0.0002, 0.0005)))
    scheduler = Scheduler(policy, Capacity(16, 1000, 4000))
    request = Request("r", range(1000), 9)
    expect(scheduler.ledger, request, cut)
    assert request is admit(scheduler.ledger)
    scheduler.submit(Request("other", range(500), 9))
    plan = scheduler.schedule(0.0)
    bill = policy.credits.billed[request]
    assert bill == pytest.approx(prices.expected(policy.cost, request, cut, policy.answers.left(request)))
    scheduler.complete(plan, StepResult(plan.step, {w.id: (7,) for w in plan.work if w.samples}, 0.1), 0.1)
    if cut < 1000:
        resume(scheduler.ledger, request, cut)
    else:
        deliver(scheduler.ledger, request, 7, 0.1)
    for now in range(1, 60):
        plan = scheduler.schedule(now)
        if plan.work:
            scheduler.complete(plan, StepResult(plan.step, {w.id: (7,) for w in plan.work if w.samples}, 0.1), now + 0.1)
    assert 9 == len(request.output)
    assert not policy.credits.billed


def test_a_request_from_elsewhere_is_billed_also_if_another_ends_at_the_same_time():
    policy = Slo("tbt=100ms", Fitted((0.011, 0.0042, 0.0025, 0.0025, 0.0002, 0.0005)))
    scheduler = Scheduler(policy, Capacity(16, 1000, 4000))
    scheduler.submit(Request("here", range(100), 1))
    plan = scheduler.schedule(0.0)
    expect(scheduler.ledger, elsewhere := Request("elsewhere", range(100), 9))
    admit(scheduler.ledger)
    scheduler.complete(plan, StepResult(plan.step, {"here": (7,)}, 0.1), 0.1)
    scheduler.schedule(0.2)
    assert {elsewhere} == policy.credits.billed.keys()
