"""Under the slo policy nobody starves: not after a burst of slow iterations, not on a slow host, not beside any streams.

In virtual time, over random scatter, standstills, slow hosts and cores taken away.
"""

import random
from statistics import median
from zlib import crc32

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, given, settings

from stallfree.core.plan import Capacity, StepResult
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.core.slo import Slo as Targets
from stallfree.perf.fitted import Fitted
from stallfree.policies import load
from stallfree.policies.slo import FLOOR, Slo

PRICES = Fitted().prices
OVERHEAD_S = 0.0008
TURN_S = 1.0
"""Seconds that a prompt may wait in addition to its prefill: for the running iteration and for the first one of its own."""


class Host:
    """A machine whose iterations take `scale` times what `Fitted` says, times a lognormal scatter of `sigma`. `slowed` gives
    one more factor, and seconds of standstill, from the time and the iteration's number."""

    def __init__(self, scale=1.0, sigma=0.05, slowed=lambda now, number: (1.0, 0.0), seed=1):
        self.cost = Fitted([scale * price for price in PRICES])
        self.sigma, self.slowed, self.rng = sigma, slowed, random.Random(seed)

    def seconds(self, shape, now, number):
        factor, stood = self.slowed(now, number)
        return factor * self.cost.seconds(shape) * self.rng.lognormvariate(0, self.sigma) + stood


class Serving:
    """A policy that is calibrated for `host` at its usual speed, and its results: of each iteration its begin and end,
    its decodes, what it could have prefilled, and its decodes that were late."""

    def __init__(self, host, slo, requests):
        self.host, self.target = host, Targets.parse(slo).tbt
        self.policy = Slo(slo, Fitted(host.cost.prices))
        self.scheduler = Scheduler(self.policy, Capacity(32, 8000, 16_384))
        self.coming = sorted(requests, key=lambda r: r.arrival)[::-1]  # `pop` gives those of the same moment in their order
        self.now, self.rows = 0.0, []

    def run(self, until):
        """Run to the first moment at which `until` holds, or to the end."""
        while (self.coming or self.scheduler.ledger.requests) and not until(self):
            while self.coming and self.coming[-1].arrival <= self.now:
                self.scheduler.submit(self.coming.pop())
            plan = self.scheduler.schedule(self.now)
            if not plan.work:
                self.now = self.coming[-1].arrival
                continue
            last = [self.scheduler.ledger.requests[w.id].last_token for w in plan.work if w.decode]
            began = self.now
            self.now += self.host.seconds(plan.shape, began, len(self.rows))
            tokens = {w.id: (1,) for w in plan.work if w.samples}
            self.scheduler.complete(plan, StepResult(plan.step, tokens, 0.0), self.now)
            late = sum(self.now - at > self.target.seconds for at in last)
            self.rows.append((began, self.now, len(last), plan.budget - len(last), late))
            self.now += OVERHEAD_S
        return self


def prompt(name, length, arrival, output=5):
    first = crc32(name.encode()) * 10**6
    return Request(name, range(first, first + length), output, arrival=arrival)


def streams(count, length=100):
    return [prompt(f"stream {i}", length, 0.0, 12_000) for i in range(count)]


def wait(serving, name):
    """Seconds until the prompt of that name has its first token."""
    request = next(r for r in serving.coming if r.id == name)
    serving.run(lambda s: request.output or s.now > 5000)
    return request.first_token - request.arrival


@pytest.mark.parametrize("slow", [4, 8, 20])
@pytest.mark.parametrize("beside", ["nothing", "a long prompt", "short prompts"])
def test_a_prompt_after_a_burst_of_slow_iterations_is_served_at_once(slow, beside):
    """One stream, a machine of 4.2 times the default prices, a target of 258 ms, and iterations that take 8 times their price."""
    burst = range(60, 60 + slow)
    host = Host(4.2, 0.03, lambda now, number: (8.0 if number in burst else 1.0, 0.0))
    others = {
        "nothing": [],
        "a long prompt": [prompt("long", 4000, 1.0)],
        "short prompts": [prompt(f"short {i}", 60, 1.0 + 0.4 * i) for i in range(20)],
    }[beside]
    serving = Serving(host, "tbt=258ms", [*streams(1), *others])
    serving.run(lambda s: len(s.rows) == burst.stop + 1)
    for r in list(serving.coming):  # the others are over: a prompt alone
        serving.coming.remove(r)
    for r in [r for r in serving.scheduler.ledger.requests.values() if r.id != "stream 0"]:
        serving.scheduler.abort(r.id)
    serving.coming.append(prompt("lone", 200, serving.now))
    assert wait(serving, "lone") <= 3.0


@pytest.mark.parametrize("stops", [1, 4, 12])
def test_a_prompt_after_standstills_of_half_a_second_is_served_at_once(stops):
    often = range(50, 50 + 7 * stops, 7)
    host = Host(2.0, 0.05, lambda now, number: (1.0, 0.5 if number in often else 0.0))
    serving = Serving(host, "tbt=150ms", [*streams(2), *(prompt(f"p{i}", 150, 0.5 + 0.5 * i) for i in range(6))])
    serving.run(lambda s: len(s.rows) == often.stop)
    serving.coming.append(prompt("lone", 200, serving.now))
    assert wait(serving, "lone") <= 3.0


BURSTS = st.one_of(
    st.tuples(st.just("slow"), st.floats(1.5, 12), st.integers(1, 40)),
    st.tuples(st.just("still"), st.floats(0.1, 2), st.integers(1, 10)),
)


@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
@given(burst=BURSTS, sigma=st.floats(0.01, 0.15), target=st.integers(100, 400), seed=st.integers(0, 99), many=st.integers(1, 12))
def test_after_any_burst_the_budget_is_back_within_200_iterations_and_5_seconds(burst, sigma, target, seed, many):
    """Back: the next 50 iterations have at least 0.4 of the tokens of the 50 before the burst. More is not promised, because the
    margin keeps what it learned: of 370 random bursts, the worst five had 0.48 to 0.55. With a scatter of 25 % and a target of
    80 ms, 50 iterations may have half of the tokens of others even without a burst, and a quarter was seen after one."""
    kind, size, length = burst
    when = range(300, 300 + length)

    def slowed(now, number):
        if number not in when:
            return 1.0, 0.0
        return (size, 0.0) if kind == "slow" else (1.0, size)

    endless = [prompt(f"p{i}", 3000, 0.0, 1) for i in range(400)]
    serving = Serving(Host(1.0, sigma, slowed, seed), f"tbt={target}ms", [*streams(many), *endless])
    rows = serving.rows
    serving.run(lambda s: len(rows) > when.stop + 200 or (len(rows) > when.stop and s.now > rows[when.stop][0] + 5))
    back = len(rows)
    serving.run(lambda s: len(rows) == back + 50)
    assert min(decodes for _, _, decodes, *_ in rows[250:300] + rows[back:]) > 0
    before, after = (median(budget for *_, budget, _ in some) for some in (rows[250:300], rows[back:]))
    assert after >= 0.4 * before


@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    count=st.integers(1, 40),
    length=st.integers(1, 3000),
    tightness=st.floats(1.05, 10),
    sigma=st.floats(0.01, 0.3),
    scale=st.floats(0.3, 8),
    seed=st.integers(0, 99),
)
def test_the_wait_of_a_lone_prompt_is_bounded_by_a_multiple_of_its_prefill_time(count, length, tightness, sigma, scale, seed):
    """Beside streams that meet their target a prompt waits at most for what it is owed. While the target leaves no credit, it gets
    one chunk of a target's length after as many iterations as may pass between two late ones."""
    host = Host(scale, sigma, seed=seed)
    decodes = host.cost.seconds([(400, 1)] * (count + 1))
    serving = Serving(host, f"tbt={max(decodes * tightness, 0.02 * scale):.4f}s", streams(count, 10))
    serving.run(lambda s: len(s.rows) == 250)
    late = sum(row[4] for row in serving.rows[150:]) / sum(row[2] for row in serving.rows[150:])
    serving.coming.append(prompt("lone", length, serving.now))
    waited = wait(serving, "lone")
    alone = host.cost.seconds([(0, length)])
    if late <= 0.01 and len(serving.scheduler.ledger.running) > 0:
        assert waited <= (1 + 1 / 0.01) * (alone + TURN_S * scale)
        if tightness > 2 and sigma < 0.1:
            assert waited <= (1 + 1 / FLOOR) * 1.25 * alone + TURN_S * scale


def slow_host(now, number):
    return (2.0 if 10 <= now % 40 < 20 else 1.0), 0.0


def taken_core(now, number):
    return (1.8 if 15 <= now < 45 else 1.0), 0.0


def standing(now, number):
    return 1.0, 0.4 if number % 397 == 396 else 0.0


def spikes(now, number):
    return (1.6 if number % 131 == 130 else 1.0), 0.0


@pytest.mark.parametrize("slowed", [lambda now, number: (1.0, 0.0), slow_host, taken_core, standing, spikes])
@pytest.mark.parametrize(("sigma", "rate"), [(0.05, 1.0), (0.05, 4.0), (0.2, 1.0), (0.2, 4.0)])
def test_late_tokens_stay_within_the_percentile_outside_of_standstills(slowed, sigma, rate):
    rng = random.Random(3)
    arrivals = []
    for i in range(250):
        length = 2000 if rng.random() < 0.05 else min(1500, int(rng.lognormvariate(5.3, 1)) + 4)
        arrivals.append(
            prompt(f"r{i}", length, (arrivals[-1].arrival if arrivals else 0) + rng.expovariate(rate), rng.randint(2, 160))
        )
    serving = Serving(Host(1.0, sigma, slowed), "tbt=100ms@p99", arrivals).run(lambda s: False)
    usual = [row for number, row in enumerate(serving.rows) if slowed is not standing or number % 397 != 396]
    assert sum(row[4] for row in usual) <= 0.01 * sum(row[2] for row in usual)


def test_a_prompt_beside_a_stream_that_is_always_late_is_served_at_the_floor():
    """Decodes alone take 1.3 times the target, so every plan breaks the promise; the prompt gets its share."""
    serving = Serving(Host(1.0, 0.05), "tbt=100ms", streams(1))
    serving.host.slowed = lambda now, number: (13.0, 0.0)
    serving.run(lambda s: s.now > 20)
    serving.coming.append(prompt("lone", 200, serving.now))
    alone = 13 * serving.host.cost.seconds([(0, 200)])
    kept_out = 100 * 13 * serving.host.cost.seconds([(300, 1)])
    assert wait(serving, "lone") <= (1 + 1 / FLOOR) * 1.25 * alone + 1.2 * kept_out


def test_a_prompt_for_which_even_one_token_takes_longer_than_the_target_is_served():
    """Reading its context alone takes longer than the target allows for an iteration."""
    prices = [*PRICES[:3], 0.5, *PRICES[4:]]
    host = Host()
    host.cost = Fitted(prices)
    serving = Serving(host, "tbt=30ms", streams(1))
    serving.run(lambda s: s.now > 2)
    serving.coming.append(prompt("lone", 3000, serving.now))
    assert wait(serving, "lone") < 1000


def test_a_stream_behind_its_envelope_lets_others_in():
    """Under tpot a standstill of 10 s leaves a stream hundreds of tokens behind; until it has caught up, others are served too."""
    serving = Serving(Host(1.0, 0.05, lambda now, number: (1.0, 10.0 if number == 50 else 0.0)), "tbt=1s", streams(1))
    serving.policy = Slo("tpot=40ms", Fitted(PRICES))
    serving.scheduler = Scheduler(serving.policy, Capacity(32, 8000, 16_384))
    serving.run(lambda s: len(s.rows) == 52)
    serving.coming.append(prompt("lone", 200, serving.now))
    assert wait(serving, "lone") <= 2.0


def crowd(policy, host) -> float:
    """Seconds until 60 short requests that come at once beside a stream are served."""
    requests = [prompt("stream", 50, 0.0, 3000), *(prompt(f"p{i}", 100, 5.0, 20) for i in range(60))]
    serving = Serving(host, "tbt=1s", requests)
    serving.policy = policy
    serving.scheduler = Scheduler(policy, Capacity(32, 8000, 16_384))
    serving.run(lambda s: not s.coming and len(s.scheduler.ledger.requests) == 1)
    return serving.now - 5.0


@pytest.mark.parametrize(("slow", "sigma"), [(1, 0.05), (4, 0.05), (4, 0.5), (10, 0.3)])
def test_without_a_target_a_slow_and_busy_host_still_serves_many_at_once(slow, sigma):
    """The default target is not in milliseconds: it is a number of decode iterations at their present speed."""

    def host():
        return Host(1.0, sigma, lambda now, number: (float(slow), 0.0))

    fixed = crowd(load("sarathi", token_budget=64), host())
    assert crowd(Slo("", Fitted(PRICES)), host()) <= 1.5 * fixed


def test_a_target_that_was_asked_for_does_not_move():
    policies = [Slo("tbt=100ms", Fitted(PRICES)), Slo("", Fitted(PRICES))]
    before = [policy.slo.tbt.seconds for policy in policies]
    for policy in policies:
        crowd(policy, Host(1.0, 0.05, lambda now, number: (5.0, 0.0)))
    explicit, default = (policy.slo.tbt.seconds / was for policy, was in zip(policies, before, strict=True))
    assert 1.0 == explicit
    assert default > 3
