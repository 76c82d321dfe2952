"""When a lead is called, and in which words it is said."""

import pytest

from stallfree.core.slo import Slo
from stallfree.metrics.report import report
from stallfree.metrics.timeline import Timeline
from stallfree.planner.candidates import Candidates, Shape
from stallfree.planner.search import Answer, Ranked
from stallfree.planner.site import Site
from stallfree.planner.verdict import verdict
from stallfree.workload.traffic import Traffic

SITE = Site("llama2-7b", gpus=2)
SLO = Slo.parse("ttft=1s,tbt=50ms")
TRAFFIC = Traffic(lengths="200/10", requests=20, max_total=4096)
REPORT = report([Timeline("0", 0.0, 200, tokens=[1.0, 2.0], reason="length")], SLO)


def ranked(deployed, draws, why=("80.0% within ttft=1s@p90",)):
    return Ranked(deployed, 1, True, sorted(draws)[len(draws) // 2], tuple(draws), 0, REPORT, None, why)


def advice(co_located, split):
    candidates = Candidates(SITE)
    alone = ranked(candidates.replica(Shape(1), "slo", replicas=2, router="shortest-queue"), co_located)
    pools = ranked(candidates.split("distserve", Shape(1), Shape(1), (1, 1)), split)
    return verdict(SITE, Answer([alone, pools], sorted([alone, pools], key=lambda each: -each.rate)), TRAFFIC, SLO)


@pytest.mark.parametrize(
    ("co_located", "split", "begins", "says"),
    [
        ([10, 9, 11, 10, 10], [15, 14, 16, 15, 15], "Disaggregate: ", "serves 50% more than the best co-located"),
        ([15, 14, 16, 15, 15], [10, 9, 11, 10, 10], "Do not disaggregate: 2 x slo TP1", "serves 50% more than the best two pools"),
        (
            [10, 9, 11, 10, 10],
            [11, 10, 12, 11, 11],
            "Do not disaggregate: it is too close to call",
            "error of such a comparison is 12%",
        ),
        (
            [11, 10, 12, 11, 11],
            [10, 9, 11, 10, 10],
            "Do not disaggregate: it is too close to call",
            "error of such a comparison is 12%",
        ),
        ([10, 9, 16, 10, 10], [15, 14, 15, 15, 15], "Do not disaggregate: it is too close to call", "but not in 1 of 5 draws"),
        ([10, 9, 11, 10, 10], [32, 30, 33, 32, 32], "Disaggregate: ", "serves 3.2 times as much as the best co-located"),
        ([0.1, 0.1, 0.1, 0.1, 0.1], [3, 3, 3, 3, 3], "Disaggregate: ", "serves next to nothing; at higher rates it misses: 80.0%"),
    ],
)
def test_a_lead_is_called_if_it_exceeds_the_models_error_and_holds_in_every_draw(co_located, split, begins, says):
    headline = advice(co_located, split).headline
    assert headline.startswith(begins)
    assert says in headline


def test_the_same_hard_draw_for_both_is_no_doubt():
    """The intervals overlap, but both kinds have the same draws."""
    wide = advice([10, 5, 20, 10, 10], [15, 8, 30, 15, 15])
    assert wide.sure
    assert wide.headline.startswith("Disaggregate: ")
    assert (0.5, pytest.approx((0.5, 0.6))) == (wide.margin, wide.margins)


def test_a_rate_stands_beside_its_interval():
    assert "(10 requests/s, 9 to 11 in 5 draws of the load; 5 a GPU)" in advice([10, 9, 11, 10, 10], [30] * 5).headline


def test_no_ratio_over_nothing_is_printed():
    wide = advice([0.05, 0, 0, 0, 0], [3] * 5)
    assert "serves next to nothing" in wide.headline
    assert wide.margin < float("inf")


def test_pools_that_serve_nothing_in_most_draws_end_no_plan():
    poor = advice([3] * 5, [0, 0, 0, 0, 0.05])
    assert poor.headline.startswith("Do not disaggregate: ")
    assert None is poor.pools


@pytest.mark.parametrize(("rate", "says"), [(11, "as much as that, within the error."), (15, ", 50% more."), (5, ", 50% less.")])
def test_what_cut_requests_would_serve_is_said_beside_the_advice_and_does_not_change_it(rate, says):
    candidates = Candidates(SITE)
    alone = ranked(candidates.replica(Shape(1), "slo", replicas=2, router="shortest-queue"), [10, 9, 11, 10, 10])
    moving = ranked(candidates.moving("taichi", ((Shape(1), 1), (Shape(1), 1)), (1024, None), str(SLO)), [rate])
    said = verdict(SITE, Answer([alone, moving], [alone], moving), TRAFFIC, SLO)
    assert said.headline.startswith("Do not disaggregate: only 2 x slo TP1")
    assert said.commands[0].startswith("stallfree deploy")
    assert "simulated only, in the first draw: taichi 1 x TP1 -> 1 x TP1, 1024/slo (" in said.moved
    assert said.moved.endswith(says)
