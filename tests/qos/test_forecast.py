"""Forecasts of first tokens: from what is ahead, at most its share of other tenants', and from how wrong earlier forecasts were."""

import pytest

from stallfree.core.request import Request
from stallfree.core.slo import Slo as Targets
from stallfree.perf.fitted import Fitted
from stallfree.policies.slo import Slo
from stallfree.qos.forecast import Forecast


def forecast(slo: str = "ttft=1s,tbt=100ms") -> Forecast:
    return Forecast(Slo(Targets.parse(slo), Fitted()))


def request(id: str, length: int = 1000, *, tenant: str = "", priority: int = 0, weight: float = 1.0) -> Request:
    return Request(id, range(length), 10, tenant=tenant, priority=priority, weight=weight)


def test_what_is_ahead_delays_and_what_is_less_urgent_does_not():
    one = forecast()
    alone = one.seconds(request("r"))
    one.enter(request("low", priority=1))
    assert alone == one.seconds(request("r"))
    one.enter(request("a"))
    once = one.seconds(request("r"))
    one.enter(request("b"))
    assert alone < once < one.seconds(request("r"))


def test_cached_tokens_take_no_time():
    assert forecast().seconds(request("r"), cached=900) < forecast().seconds(request("r")) / 3


def test_another_tenants_backlog_counts_at_most_with_its_share():
    one = forecast()
    for number in range(50):
        one.enter(request(str(number), tenant="greedy"))
    modest = one.seconds(request("r", tenant="modest"))
    assert modest < 3 * forecast().seconds(request("r"))
    assert modest < one.seconds(request("r", tenant="greedy")) / 10


def test_who_leaves_counts_no_more_and_its_outcome_is_learned():
    one = forecast()
    raw = one.seconds(request("r"))
    for number in range(40):
        r = request(str(number))
        one.enter(r)
        r.output, r.first_token = [1], 2 * raw
        one.leave(r.id)
        one.leave(r.id)
    assert 0 == one.backlog
    assert 2 * raw == pytest.approx(one.seconds(request("r")))
    assert 2 * raw == pytest.approx(r.predicted, rel=0.01)


def test_a_prompt_from_elsewhere_counts_with_the_rest_that_is_computed_here_and_teaches_nothing():
    one, other = forecast(), forecast()
    alone = one.seconds(request("r"))
    for given in [600, 1000] * 20:
        r = request("r")
        one.expect(r, given)
        other.enter(r, given)
        assert (other.backlog if given < 1000 else 0) == one.backlog
        r.output, r.first_token = [1], 60.0
        one.leave(r.id)
        other.leave(r.id)
    assert 0 == one.backlog
    assert alone == one.seconds(request("r")) != other.seconds(request("r"))


def test_a_request_that_would_be_late_is_told_by_how_much():
    one = forecast()
    assert one.late(request("r")) is None
    for number in range(10):
        one.enter(request(str(number)))
    late = one.late(request("r"))
    assert late is not None
    assert 1.0 == late.target < late.predicted
    assert late.predicted - 1 == late.retry_after
    assert 0 == one.room


def test_nobody_is_refused_for_its_own_length_or_without_a_target():
    one = forecast()
    one.enter(request("a"))
    assert one.late(request("long", 100_000)) is None
    without = forecast("tbt=100ms")
    for number in range(100):
        without.enter(request(str(number)))
    assert without.late(request("r")) is None


def test_late_first_tokens_make_it_cautious_and_timely_ones_bold():
    one = forecast()
    cautions = []
    for seconds in [3.0] * 20 + [0.1] * 400:
        r = request("r")
        one.enter(r)
        r.output, r.first_token = [1], seconds
        one.leave("r")
        cautions.append(one.caution)
    assert cautions[19] == max(cautions) > 1
    assert cautions[-1] < 1
