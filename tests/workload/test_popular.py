"""Adapters are drawn by their popularity, the same from the same seed, and change nothing else of a workload."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from stallfree.workload.traffic import Traffic
from stallfree.workload.workload import MOST_ADAPTERS, Popular

PLAIN = Traffic(lengths="median=300,p90=900/median=40,p90=90", rate=5.0, requests=300)
ASKING = replace(PLAIN, adapters=20)


def drawn(popular: Popular, number: int = 40_000, seed: int = 1) -> Counter[int]:
    return Counter(map(int, islice(popular.draws(np.random.default_rng(seed)), number)))


def test_the_kth_adapter_has_a_share_that_falls_as_one_over_k():
    counts = drawn(Popular(10))
    whole = sum(1 / k for k in range(1, 11))
    for k in range(1, 11):
        assert 40_000 / k / whole == pytest.approx(counts[k - 1], rel=0.06)


def test_a_larger_exponent_is_more_uneven_and_0_is_even():
    even, one, two = (drawn(Popular(50, zipf))[0] for zipf in (0.0, 1.0, 2.0))
    assert 800 == pytest.approx(even, rel=0.15)
    assert even < one < two


def test_every_adapter_is_drawn_and_no_other():
    assert set(range(100)) == set(drawn(Popular(100)))
    assert {0} == set(drawn(Popular(1), 100))


def test_the_same_seed_draws_the_same_adapters():
    first, again, other = (drawn(Popular(1000), 500, seed) for seed in (3, 3, 4))
    assert first == again != other


def test_a_workload_draws_the_same_requests_with_adapters_as_without():
    assert PLAIN.draw() == [replace(arrival, adapter="") for arrival in ASKING.draw()]
    assert ASKING.draw() == ASKING.draw()
    assert 1 < len({arrival.adapter for arrival in ASKING.draw()}) <= 20


def test_another_rate_draws_the_same_adapters():
    assert [a.adapter for a in ASKING.stream(5.0)] == [a.adapter for a in ASKING.stream(50.0)]


@pytest.mark.parametrize(
    ("number", "zipf", "says"),
    [
        (0, 1.0, "0 adapters are none; give 1 or more, or leave --adapters out"),
        (-3, 1.0, "-3 adapters are none"),
        (MOST_ADAPTERS + 1, 1.0, "1,000,001 adapters are more than the limit of 1,000,000"),
        (5, -0.1, "an exponent of -0.1 .* give 0 to 10"),
        (5, 11.0, "an exponent of 11"),
        (5, float("nan"), "an exponent of nan"),
    ],
)
def test_a_popularity_that_is_none_is_named(number, zipf, says):
    with pytest.raises(ValueError, match=says):
        Popular(number, zipf)
    with pytest.raises(ValueError, match=says):
        replace(PLAIN, adapters=number, adapter_zipf=zipf).draw()


def test_the_facts_of_a_load_name_its_adapters():
    assert (20, 1.0) == tuple(ASKING.facts(300)[key] for key in ("adapters", "adapter_zipf"))
    assert (None, None) == tuple(PLAIN.facts(300)[key] for key in ("adapters", "adapter_zipf"))
