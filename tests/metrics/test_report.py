"""Reports of timelines whose figures can be computed by hand."""

import numpy as np
import pytest

from stallfree.core.classes import Classes
from stallfree.core.slo import Slo
from stallfree.metrics.report import Attainment, LongWaits, Quantiles, Tally, by_class, report
from stallfree.metrics.table import classes, table, tenants
from stallfree.metrics.timeline import Timeline


def line(arrival, tokens, reason="length"):
    return Timeline("x", arrival, 10, tokens=tokens, reason=reason)


TWO = [line(0, [1, 2, 3]), line(1, [2, 12])]


def test_ttft_and_e2e_are_over_the_requests():
    result = report(TWO)
    assert (1, 1) == (result.ttft_s.p50, result.ttft_s.max)
    assert (7, 11) == (result.e2e_s.p50, result.e2e_s.max)


def test_tbt_is_pooled_over_all_gaps_and_tpot_is_not():
    result = report(TWO)
    assert (1, 10) == (result.tbt_s.p50, result.tbt_s.max)
    assert (5.5, 10) == (result.tpot_s.p50, result.tpot_s.max)


def test_rates_are_over_the_time_from_the_first_arrival_to_the_last_token():
    result = report(TWO, nominal_rate=2)
    assert (5, 12, 5 / 12) == (result.output_tokens, result.seconds, result.output_tokens_per_s)
    assert (2, 1) == (result.request_rate.nominal, result.request_rate.actual)


def test_requests_that_ended_in_errors_are_counted_by_kind_and_their_gaps_count():
    result = report([*TWO, line(2, [], "HTTP 429"), line(2, [3, 23], "cut short"), line(2, [], "HTTP 429"), line(3, [4], None)])
    assert (2, {"HTTP 429": 2, "cut short": 1}, 1) == (result.completed, result.errors, result.unfinished)
    assert (20, 11) == (result.tbt_s.max, result.e2e_s.max)


def test_prompt_tokens_from_the_prefix_cache_are_counted_where_they_are_known():
    hit = Timeline("x", 0, 10, tokens=[1, 2], reason="length", cached=6)
    rows = {name: cell for name, *cell in table({"sim": report([hit, hit]), "client": report(TWO)})}
    assert (12, None) == (report([hit, hit]).cached_tokens, report(TWO).cached_tokens)
    assert ["60.0%", "-"] == rows["prompt tokens from the prefix cache"]
    assert "prompt tokens from the prefix cache" not in [name for name, *_ in table({"client": report(TWO)})]


def test_a_stall_is_a_gap_of_more_than_five_median_ones_if_there_is_no_target():
    tokens = [1, 2, 3, 4, 9, 15, 16]
    assert (5, 1, 1 / 6) == tuple(getattr(report([line(0, tokens)]).stalls, name) for name in ("after_s", "count", "share"))


def test_a_target_for_tbt_says_what_a_stall_is():
    stalls = report([line(0, [1, 2, 3, 4.5])], Slo.parse("tbt=1.2s")).stalls
    assert (1.2, 1) == (stalls.after_s, stalls.count)


def test_tokens_that_come_together_do_not_make_every_gap_a_stall():
    stalls = report([line(0, [1, 1, 1, 2, 2, 2, 3, 3, 3])]).stalls
    assert (5, 0) == (stalls.after_s, stalls.count)


@pytest.mark.parametrize(("percentile", "met"), [(75, True), (76, False)])
def test_tbt_is_met_if_no_larger_share_of_gaps_is_late_than_the_percentile_leaves(percentile, met):
    slo = Slo.parse(f"tbt=2s@p{percentile}")
    assert {"tbt": Attainment(f"2s@p{percentile}", 0.75, met)} == report([line(0, [1, 2, 3, 4, 9])], slo).slo_attainment


def test_a_request_that_failed_before_its_first_token_is_late_however_soon_it_failed():
    lines = [line(0, [1]), line(0, [], "HTTP 429"), line(0, [], None)]
    assert Attainment("2s@p90", 0.5, False) == report(lines, Slo.parse("ttft=2s")).slo_attainment["ttft"]


def test_tpot_lets_early_tokens_bank_slack():
    slo = Slo.parse("tpot=1s")
    assert 1 == report([line(0, [5, 5.1, 5.2, 8])], slo).slo_attainment["tpot"].in_time
    assert 2 / 3 == pytest.approx(report([line(0, [5, 5.1, 7.2, 8])], slo).slo_attainment["tpot"].in_time)


def test_tpot_counts_from_when_the_first_token_was_due():
    slo = Slo.parse("ttft=2s,tpot=1s")
    assert 1 == report([line(0, [0.5, 3, 4])], slo).slo_attainment["tpot"].in_time
    assert 0.5 == report([line(0, [2.5, 3, 4.1])], slo).slo_attainment["tpot"].in_time


def test_a_target_without_a_case_is_not_met():
    assert Attainment("100ms@p99", None, False) == report([line(0, [1])], Slo.parse("tbt=100ms")).slo_attainment["tbt"]


def test_nothing_can_be_reported_too():
    result = report([])
    assert (0, 0, 0.0, None, None, None) == (
        result.completed, result.output_tokens, result.output_tokens_per_s, result.request_rate.actual, result.tbt_s, result.stalls,
    )  # fmt: skip


def test_quantiles_lie_between_the_values():
    assert Quantiles(50, 90, 99, 100) == report([line(0, [float(i)]) for i in range(101)]).ttft_s


def test_reports_stand_side_by_side():
    slo = Slo.parse("tbt=2s@p90")
    rows = {row[0]: row[1:] for row in table({"a": report(TWO, slo, 2), "b": report([line(0, [], "timeout")], slo)})}
    assert ["a", "b"] == rows[""]
    assert ["0", "1 timeout"] == rows["errors"]
    assert ["1000", "-"] == rows["TBT p50, ms"]
    assert ["66.67% MISSED", "-"] == rows["within tbt=2s@p90"]


@pytest.mark.parametrize("count", [1, 2, 7, 100, 5000])
def test_a_tally_that_sorts_often_has_numpys_percentiles(monkeypatch, count):
    monkeypatch.setattr("stallfree.metrics.pool.Pool.BUFFER", 16)
    rng = np.random.default_rng(count)
    gaps = rng.choice(rng.random(50), count)
    tally = Tally()
    for number, part in enumerate(np.array_split(gaps, max(1, count // 9))):
        tally.add(Timeline(str(number), 0.0, 1, tokens=[0.0, *map(float, np.cumsum(part))]))
    pooled = np.concatenate([np.diff([0.0, *np.cumsum(part)]) for part in np.array_split(gaps, max(1, count // 9))])
    tbt = tally.report().tbt_s
    assert pytest.approx(np.percentile(pooled, [50, 90, 99, 100]), rel=1e-14) == [tbt.p50, tbt.p90, tbt.p99, tbt.max]


def test_a_tally_and_a_list_amount_to_the_same():
    lines = [Timeline(str(i), i * 0.1, 3, tokens=[i + 0.2 * k for k in range(1, 6)], reason="length") for i in range(20)]
    tally = Tally(Slo.parse("tbt=100ms,ttft=1s"))
    for line in reversed(lines):
        tally.add(line)
    assert report(lines, Slo.parse("tbt=100ms,ttft=1s"), 10.0) == tally.report(10.0)


def test_a_long_wait_for_a_first_token_is_counted_whether_it_came_or_not():
    gave_up = Timeline("x", 0, 10, finished=40.0, reason="abort")
    result = report([*TWO, line(0, [287, 288]), gave_up])
    assert LongWaits(10.0, 2, 287.0) == result.long_waits
    assert ["waits for a first token", "2 (> 10 s), longest 287 s"] in table({"run": result})


def test_a_target_for_ttft_says_what_a_long_wait_is():
    assert LongWaits(0.5, 2, 1.0) == report(TWO, Slo.parse("ttft=500ms")).long_waits


CLASSES = Classes.parse("chat: ttft=2s,tbt=1.5s; batch: ttlt=20s")
MIXED = [
    Timeline("a", 0, 10, tokens=[1, 2, 3], finished=3, reason="length", tenant="acme", service_class="chat"),
    Timeline("b", 0, 10, tokens=[5, 6], finished=6, reason="length", tenant="acme"),
    Timeline("c", 0, 80, tokens=[9, 19], finished=19, reason="length", tenant="crawler", service_class="batch"),
    Timeline("d", 0, 80, tokens=[9, 29], finished=29, reason="length", tenant="crawler", service_class="batch"),
]


def test_a_request_is_judged_by_its_own_class_and_one_of_no_class_by_the_first():
    result = report(MIXED, CLASSES)
    assert (0.5, 2 / 29) == (result.goodput.share, result.goodput.requests_per_s)
    shares = {name: met.in_time for name, met in result.slo_attainment.items()}
    assert {"chat ttft": 0.5, "chat tbt": 1.0, "batch ttlt": 0.5} == shares


def test_each_class_is_reported_by_itself():
    chat, batch = report(MIXED, CLASSES).classes.values()
    assert (2, 5, 1) == (chat.requests, chat.ttft_s.max, chat.tbt_s.max)
    assert (2, 9, 20, 0.5, 1 / 29) == (
        batch.requests, batch.ttft_s.max, batch.tbt_s.max, batch.goodput.share, batch.goodput.requests_per_s,
    )  # fmt: skip


def test_a_class_without_requests_misses_nothing():
    assert ["batch ttlt"] == list(report(MIXED[2:], CLASSES).slo_attainment)


def test_a_class_is_completed_by_the_first_unless_it_has_a_target_for_the_last_token():
    slow = Classes.parse("chat: ttft=2s,tbt=1.5s; slow: ttft=9s; batch: ttlt=20s")
    assert Slo.parse("ttft=9s,tbt=1.5s") == by_class(slow)["slow"]
    assert Slo.parse("ttlt=20s") == by_class(slow)["batch"]


def test_each_tenant_has_its_share_of_the_tokens_and_its_own_ttft():
    result = report(MIXED)
    assert ({}, {"acme", "crawler"}) == (result.classes, result.tenants.keys())
    acme, crawler = result.tenants.values()
    assert (2, 25, 25 / 189, 5) == (acme.requests, acme.tokens, acme.share, acme.ttft_s.max)
    assert (164, 9) == (crawler.tokens, crawler.ttft_s.p50)


def test_without_tenants_and_classes_there_are_no_parts():
    assert ({}, {}) == (report(TWO).tenants, report(TWO, Slo.parse("tbt=1s")).classes)
    assert ([], []) == (classes({"run": report(TWO)}), tenants({"run": report(TWO)}))


def test_classes_and_tenants_are_rows():
    one = {"run": report(MIXED, CLASSES)}
    assert ["class", "chat", "batch"] == [row[0] for row in classes(one)]
    assert "ttlt=20s@p99 50.00% MISSED" == classes(one)[2][-1]
    assert [["crawler", "2", "86.8%", "164", "9000", "9000"]] == [row for row in tenants(one) if row[0] == "crawler"]
    assert ["tenant", "run: crawler", "run: acme", "also: crawler", "also: acme"] == [
        row[0] for row in tenants(one | {"also": one["run"]})
    ]
