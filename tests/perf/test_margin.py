"""The margin is exceeded as often as allowed, for any distribution of the scores, and it forgets a burst."""

import random

import pytest

from stallfree.perf.margin import MEMORY, MEMORY_S, Margin


def fed(margin: Margin, scores, now: float = 0.0, tokens: int = 8, period: float = 0.04) -> float:
    """The share of iterations that took longer than the margin said, which makes their tokens late."""
    over = 0
    for score in scores:
        now += period
        late = score > margin.value
        over += late
        margin.learn(now, score, tokens * late, tokens, filled=True)
    return over / len(scores)


@pytest.mark.parametrize("late_share", [0.01, 0.05, 0.1])
@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: rng.lognormvariate(0, 0.05),
        lambda rng: rng.lognormvariate(0, 0.4),
        lambda rng: rng.uniform(0.5, 2),
        lambda rng: 1.7 if rng.random() < 0.05 else 1.0 + 0.01 * rng.random(),
        lambda rng: 3 * rng.lognormvariate(0, 0.1),
    ],
)
def test_it_is_exceeded_as_often_as_allowed_in_the_long_run(late_share, draw):
    rng = random.Random(1)
    share = fed(Margin(late_share), [draw(rng) for _ in range(20_000)])
    assert share <= late_share


def test_it_is_not_much_more_careful_than_it_has_to_be():
    rng = random.Random(1)
    assert fed(Margin(0.05), [rng.lognormvariate(0, 0.2) for _ in range(20_000)]) >= 0.6 * 0.05


def test_a_late_token_widens_the_margin_and_many_in_time_narrow_it():
    margin = Margin(0.01)
    fed(margin, [1 + i % 10 / 100 for i in range(100)])
    before = margin.value
    margin.learn(5.0, 1.5, 8, 8, filled=True)
    wide = margin.value
    fed(margin, [1 + i % 10 / 100 for i in range(1000)], now=5.0)
    assert before < wide
    assert margin.value < wide


@pytest.mark.parametrize("period", [0.01, 0.2])
def test_after_a_burst_it_is_what_the_scores_since_then_say(period):
    """Short iterations are forgotten by their number, long ones by time."""
    margin = Margin(0.01)
    fed(margin, [8.0] * 40, period=period)
    assert margin.value > 5
    calm = int(min(MEMORY, MEMORY_S / period)) + 2
    fed(margin, [1.0] * calm, now=40 * period, period=period)
    assert margin.value <= 1.3


def test_decodes_alone_show_that_a_burst_is_over():
    margin = Margin(0.01)
    fed(margin, [8.0] * 40)
    for i in range(MEMORY + 1):
        margin.learn(10 + 0.01 * i, 1.0, 0, 8, filled=False)
    assert margin.value <= 1.3


def test_a_machine_that_stands_still_is_told_from_scatter():
    margin = Margin(0.01)
    rng = random.Random(2)
    scores = [rng.lognormvariate(0, 0.1) for _ in range(1000)]
    fed(margin, scores)
    assert not margin.stood_still(max(scores))
    assert margin.stood_still(8.0)


def test_credit_is_spent_by_late_tokens_and_earned_by_those_in_time():
    margin = Margin(0.01)
    assert margin.credit > 0
    fed(margin, [9.0] * 2)
    assert margin.credit < 0
    fed(margin, [1.0] * 300, now=1.0)
    assert margin.credit > 0


def test_decodes_that_are_late_by_themselves_break_the_promise_until_they_are_in_time():
    margin = Margin(0.01)
    margin.learn(0.0, 1.0, 8, 8, filled=False)
    assert not margin.broken
    for i in range(10):
        margin.learn(0.1 * i, 1.0, 8, 8, filled=False)
    assert margin.broken
    for i in range(300):
        margin.learn(1 + 0.1 * i, 1.0, 0, 8, filled=False)
    assert not margin.broken
