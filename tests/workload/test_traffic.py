"""Traffic in words is drawn like its workload, and lasts as long as a trial needs."""

from dataclasses import replace

import pytest

from stallfree.workload.traffic import Traffic

TEN = Traffic(lengths="8/8", requests=10)


@pytest.mark.parametrize(("rate", "number"), [(0.1, 10), (1.0, 20), (3.01, 61)])
def test_a_trial_lasts_by_more_requests(rate, number):
    assert number == TEN.lasting(20.0, rate).requests


@pytest.mark.parametrize("change", [{"arrivals": "trace"}, {"requests": None, "duration": 5.0}, {"requests": 0}])
def test_what_has_an_end_of_its_own_keeps_it(change):
    traffic = replace(TEN, **change)
    assert traffic == traffic.lasting(60.0, 100.0)


def test_a_trial_that_never_ends_is_refused():
    with pytest.raises(ValueError, match="at least inf s"):
        TEN.lasting(float("inf"), 1.0)
