"""Drawn workloads have the requested rate, burstiness and lengths, and are the same for the same seed."""

import math
import statistics
from itertools import islice, pairwise

import pytest

from stallfree.workload.workload import Arrival, Workload


def gaps(drawn):
    return [b.at - a.at for a, b in pairwise(drawn)]


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("arrived_at,prompt_tokens,output_tokens\n10,100,1\n11,200,2\n14,300,3\n")
    return str(path)


@pytest.mark.parametrize(("arrivals", "cv"), [("poisson", 1), ("gamma:cv=3", 3), ("gamma:cv=0.25", 0.25)])
def test_gaps_have_the_mean_of_the_rate_and_the_variation_asked_for(arrivals, cv):
    measured = gaps(Workload.parse(arrivals, "8/8").draw(5, seed=1, requests=20_000))
    assert pytest.approx(0.2, rel=0.05) == statistics.mean(measured)
    assert pytest.approx(cv, rel=0.05) == statistics.stdev(measured) / statistics.mean(measured)


def test_poisson_gaps_are_not_cut_off():
    measured = gaps(Workload.parse("poisson", "8/8").draw(1, seed=1, requests=20_000))
    assert pytest.approx(2.718**-5, rel=0.15) == sum(gap > 5 for gap in measured) / len(measured)


def test_the_papers_gaps_are_cut_at_three_times_their_mean_and_make_a_higher_rate():
    measured = gaps(Workload.parse("poisson:cut=3", "8/8").draw(2, seed=1, requests=50_000))
    assert pytest.approx(1.5) == max(measured)
    assert pytest.approx(2 * 1.052, rel=0.02) == 1 / statistics.mean(measured)


def test_bursts_have_the_rate_over_all_and_silence_between():
    drawn = Workload.parse("bursts:on=10s,off=30s", "8/8").draw(5, seed=1, duration_s=40_000)
    assert pytest.approx(200_000, rel=0.1) == len(drawn)
    silent = [gap for gap in gaps(drawn) if gap > 2]
    assert pytest.approx(30, rel=0.1) == statistics.mean(silent)
    assert pytest.approx(0.05, rel=0.1) == statistics.mean(gap for gap in gaps(drawn) if gap <= 2)


def test_a_day_has_its_rush_hour_and_its_night():
    drawn = Workload.parse("diurnal:period=1h,swing=0.8", "8/8").draw(0.5, seed=1, duration_s=20 * 3600)
    rush = sum(1500 <= a.at % 3600 < 2100 for a in drawn) / (20 * 600)
    night = sum(a.at % 3600 < 300 or a.at % 3600 >= 3300 for a in drawn) / (20 * 600)
    mean_cosine = math.sin(math.pi / 6) / (math.pi / 6)
    assert pytest.approx(0.5, rel=0.05) == len(drawn) / (20 * 3600)
    assert pytest.approx(0.5 * (1 + 0.8 * mean_cosine), rel=0.05) == rush
    assert pytest.approx(0.5 * (1 - 0.8 * mean_cosine), rel=0.1) == night


@pytest.mark.parametrize("arrivals", ["poisson:cut=3", "bursts:on=10s,off=30s", "diurnal:period=1h,swing=0.8"])
def test_whatever_the_process_a_longer_run_begins_as_a_shorter_one_and_a_faster_has_the_same_requests(arrivals):
    workload = Workload.parse(arrivals, "median=100,p90=300/9")
    slow, fast = workload.draw(2, 7, requests=50), workload.draw(4, 7, requests=80)
    assert slow[:20] == workload.draw(2, 7, requests=20)
    assert [a.prompt_tokens for a in slow] == [a.prompt_tokens for a in fast[:50]]
    assert all(a.at <= b.at for a, b in pairwise(fast))


def test_a_stream_draws_one_after_another():
    workload = Workload.parse("poisson", "openchat")
    assert workload.draw(2, 7, requests=30) == list(islice(workload.stream(2, 7, requests=10**9), 30))


def test_the_same_seed_draws_the_same_and_another_does_not():
    workload = Workload.parse("gamma:cv=2", "median=100,p90=300/9 + 10%:900/9")
    assert workload.draw(2, 7, requests=50) == workload.draw(2, 7, requests=50)
    assert workload.draw(2, 7, requests=50) != workload.draw(2, 8, requests=50)


def test_at_twice_the_rate_the_same_requests_come_in_half_the_time():
    workload = Workload.parse("poisson", "median=100,p90=300/9 + 10%:900/9")
    slow, fast = workload.draw(2, 7, requests=50), workload.draw(4, 7, requests=50)
    assert [a.prompt_tokens for a in slow] == [a.prompt_tokens for a in fast]
    assert pytest.approx([a.at / 2 for a in slow]) == [a.at for a in fast]


def test_a_longer_run_begins_as_a_shorter_one():
    workload = Workload.parse("poisson", "median=100,p90=300/9 + 10%:900/9")
    assert workload.draw(2, 7, requests=20) == workload.draw(2, 7, requests=50)[:20]


@pytest.mark.parametrize(("amount", "says"), [({"requests": 10**7}, "10,000,000 requests"), ({"duration_s": 1e9}, "2,000,000,000")])
def test_more_requests_than_anybody_means_are_refused_before_they_are_drawn(amount, says):
    with pytest.raises(ValueError, match=says):
        Workload.parse("poisson", "8/8").draw(2, 1, **amount)


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_a_duration_that_cannot_be_is_named(seconds):
    with pytest.raises(ValueError, match=f"duration of {seconds:g} s"):
        Workload.parse("poisson", "8/8").draw(2, 1, duration_s=seconds)


def test_a_duration_ends_the_arrivals():
    drawn = Workload.parse("poisson", "8/8").draw(100, 1, duration_s=20)
    assert drawn[-1].at < 20
    assert pytest.approx(2000, rel=0.1) == len(drawn)


def test_a_trace_arrives_at_its_own_times_from_its_first_on(trace):
    expected = [Arrival(0, 100, 1), Arrival(1, 200, 2), Arrival(4, 300, 3)]
    assert expected == Workload.parse("trace", trace).draw(None, 0)


def test_a_trace_is_stretched_to_a_rate(trace):
    assert [0, 2, 8] == [a.at for a in Workload.parse("trace", trace).draw(0.25, 0)]


def test_each_seed_begins_a_part_of_a_trace_at_another_place_and_goes_on_after_its_end(trace):
    workload = Workload.parse("trace", trace)
    first, second, third = (workload.draw(None, seed, requests=3) for seed in (0, 1, 2))
    assert [100, 200, 300] == [a.prompt_tokens for a in first]
    assert [200, 300, 100] == [a.prompt_tokens for a in second]
    # After the last request, at 4 s, the first comes again a mean gap of 2 s later.
    assert [0, 3, 5] == [a.at for a in second]
    assert [100, 200, 300] == [a.prompt_tokens for a in third]
    assert [0, 6, 10] == [a.at for a in workload.draw(0.25, 1, requests=3)]


def test_parts_of_a_long_trace_do_not_overlap(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("arrived_at,prompt_tokens,output_tokens\n" + "".join(f"{i},{i + 1},1\n" for i in range(4000)))
    workload = Workload.parse("trace", str(path))
    parts = [{a.prompt_tokens for a in workload.draw(None, seed, requests=512)} for seed in range(5)]
    assert 5 * 512 == len(set().union(*parts))


def test_a_whole_trace_is_the_same_for_all_seeds(trace):
    workload = Workload.parse("trace", trace)
    assert workload.draw(None, 0) == workload.draw(None, 1)


def test_long_prompts_can_be_mixed_into_a_trace_without_moving_its_arrivals(trace):
    drawn = Workload.parse("trace", f"{trace} + 50%:2000/64").draw(None, 3)
    assert [0, 1, 4] == [a.at for a in drawn]
    assert {2000} < {a.prompt_tokens for a in drawn}


@pytest.mark.parametrize(
    ("arrivals", "says"),
    [
        ("poison", "'poison'"),
        ("gamma:cv=x", "gamma:cv=2"),
        ("gamma:cv=0", "above 0"),
        ("gamma", "lacks cv"),
        ("poisson:cv=2", "'poisson:cv=2'"),
        ("poisson:", "'poisson:'"),
        ("poisson:cut=0", "leaves no gaps"),
        ("bursts:on=10s", "lacks off"),
        ("bursts:on=0s,off=5s", "bursts of 0 s"),
        ("diurnal:period=1h,swing=2", "swing of 2"),
        ("diurnal:period=1d,swing=1", "diurnal:period=24h"),
        ("trace", "from a .csv"),
    ],
)
def test_arrivals_that_cannot_be_are_named(arrivals, says):
    with pytest.raises(ValueError, match=says):
        Workload.parse(arrivals, "8/8")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rate": 0, "requests": 1}, "rate of 0"),
        ({"rate": None, "requests": 1}, "need a rate"),
        ({"rate": 1}, "number of requests or a duration"),
        ({"rate": 1, "requests": 1, "duration_s": 1}, "number of requests or a duration"),
        ({"rate": 1, "requests": 0}, "at least 1"),
        ({"rate": 1, "duration_s": 1e-9}, "nothing arrives"),
        ({"rate": 1, "requests": 1, "seed": -1}, "seed -1"),
    ],
)
def test_what_cannot_be_drawn_is_said(options, says):
    with pytest.raises(ValueError, match=says):
        Workload.parse("poisson", "8/8").draw(**{"seed": 0} | options)


def test_a_trace_is_not_longer_than_it_is(trace):
    with pytest.raises(ValueError, match="has 3 requests that fit, fewer than 4"):
        Workload.parse("trace", trace).draw(None, 0, requests=4)
