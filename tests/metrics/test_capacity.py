"""The search finds the capacity of servers with sharp and with noisy verdicts; trials fail for good reasons."""

import random
import statistics

import pytest

from stallfree.core.slo import Slo
from stallfree.metrics.capacity import Decision, decide, search, shortfalls
from stallfree.metrics.report import report
from stallfree.metrics.timeline import Timeline


def noisy(capacity: float, width: float, run: int):
    """Always passes at `width` below the capacity, never at `width` above; between them, lower rates pass more often."""
    return lambda rate, seed: random.Random(f"{run} {rate} {seed}").random() < 0.5 + (capacity - rate) / (2 * width)


@pytest.mark.parametrize("start", [0.01, 1, 3.7, 500])
def test_a_sharp_capacity_is_found_from_any_start(start):
    capacity = search(lambda rate, _: rate <= 3.7, start, tolerance=0.02)
    assert capacity.rate <= 3.7 < capacity.above <= 1.02 * capacity.rate


@pytest.mark.parametrize("start", [0.1, 3.5, 3.69, 3.9, 40])
def test_a_search_that_begins_with_a_small_step_ends_at_the_same_capacity(start):
    capacity = search(lambda rate, _: rate <= 3.7, start, tolerance=0.04, step=1.04)
    assert capacity.rate <= 3.7 < capacity.above <= 1.04 * capacity.rate * (1 + 1e-9)


def test_a_search_that_begins_close_and_with_a_small_step_is_short():
    def trials(start, step):
        return len(search(lambda rate, _: rate <= 3.7, start, tolerance=0.04, most_trials=1, step=step).decisions)

    assert 2 == trials(3.6, 1.04)
    assert trials(3.6, 1.04) < trials(3.6, 2)


def test_a_noisy_capacity_is_found_more_exactly_with_more_trials():
    def errors(most_trials):
        rates = [search(noisy(10, 2, run), 1, most_trials=most_trials, tolerance=0.02).rate for run in range(200)]
        return statistics.mean(abs(rate - 10) for rate in rates)

    assert errors(5) < 0.8
    assert errors(5) < errors(1)


def test_every_rate_is_tried_with_the_same_seeds():
    seeds_by_rate = {}
    search(lambda rate, seed: seeds_by_rate.setdefault(rate, []).append(seed) or rate < 3, 1, seed=7)
    assert {(7, 8)} == {tuple(seeds) for seeds in seeds_by_rate.values()}


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [("pp", (2, 0, True)), ("ff", (0, 2, True)), ("pfff", (1, 3, True)), ("pfpfp", (3, 2, False)), ("pffpf", (2, 3, False))],
)
def test_trials_end_once_one_verdict_leads_by_two(verdicts, expected):
    decision = decide(1.0, lambda _, seed: verdicts[seed] == "p", 5, 0)
    assert expected == (decision.passed, decision.failed, decision.sure)


def test_a_server_that_meets_the_slo_at_any_rate_has_no_bound():
    capacity = search(lambda rate, _: True, 1, most_trials=1)
    assert (2**20, None) == (capacity.rate, capacity.above)


def test_a_server_that_never_meets_the_slo_has_no_capacity_and_no_rate_below_the_lowest_is_tried():
    capacity = search(lambda rate, _: False, 1, lowest=0.2, most_trials=1)
    assert (0, 0.25) == (capacity.rate, capacity.above)
    assert [1, 0.5, 0.25] == [decision.rate for decision in capacity.decisions]


def test_decisions_are_told_in_their_order():
    assert (Decision(1, 2, 0), Decision(2, 0, 2), Decision(1.5, 0, 2)) == search(lambda r, _: r < 1.2, 1, tolerance=0.5).decisions


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"start": 0}, "start at 0"),
        ({"step": 1}, "a step of 1 times"),
        ({"tolerance": 0}, "0.001"),
        ({"most_trials": 4}, "odd number"),
    ],
)
def test_options_that_cannot_be_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        search(lambda rate, _: True, **{"start": 1} | options)


def lines(ttft, gap, n=100, reason="length"):
    return [Timeline("x", 0, 1, tokens=[ttft, ttft + gap], reason=reason) for _ in range(n)]


@pytest.mark.parametrize(
    ("measured", "slo", "says"),
    [
        (lines(1, 0.05), "tbt=100ms", None),
        (lines(1, 0.2), "tbt=100ms", "0.0% within tbt=100ms@p99"),
        (lines(1, 0.05, 9896) + lines(1, 0.2, 104), "tbt=100ms", "98.9% within tbt=100ms@p99"),
        (lines(3, 0.05), "tbt=100ms", "median TTFT 3 s"),
        (lines(3, 0.05), "tbt=100ms,ttft=5s", None),
        (lines(3, 0.05) + lines(3, 0.05, 1, "HTTP 429"), "tbt=100ms,ttft=5s", None),
        (lines(3, 0.05) + lines(3, 0.05, 2, "HTTP 429"), "tbt=100ms,ttft=5s", "2 of 102 requests failed"),
        ([], "tbt=100ms", "median TTFT none"),
    ],
)
def test_a_trial_fails_for_late_tokens_a_growing_queue_or_refusals(measured, slo, says):
    slo = Slo.parse(slo)
    reasons = "; ".join(shortfalls(report(measured, slo), slo))
    assert says in reasons if says else reasons == ""


def test_the_lowest_rate_itself_is_tried_with_a_small_step():
    tried = []

    def passes(rate, seed):
        tried.append(rate)
        return rate <= 0.35

    found = search(passes, 1.0, lowest=1 / 3, tolerance=0.05, most_trials=1, step=1.2)
    assert 1 / 3 in tried
    assert 1 / 3 <= found.rate <= 0.35
    assert 0.0 == search(lambda rate, seed: False, 1.0, lowest=1 / 3, most_trials=1, step=1.2).rate
