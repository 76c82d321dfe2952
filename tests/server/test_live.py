"""What the live page gets from the records that are kept for it."""

from dataclasses import replace

import pytest

from stallfree.core.record import Arrived, Finished, StepRecord
from stallfree.core.slo import Slo
from stallfree.metrics.stalls import StallAccount
from stallfree.server import live as module
from stallfree.server.live import Live

TBT = Slo.parse("ttft=150ms,tbt=100ms")


def step(number: int, t_start: float, t_end: float, work, **fields) -> StepRecord:
    """An iteration in which all get a token."""
    values = {
        "emitted": [id for id, _, _ in work], "cached": [], "arrived": [], "finished": [], "preempted": [], "stalled": [],
        "num_running": 2, "num_waiting": 1, "free_blocks": 9, "budget": 64, "reason": "", "limit_s": 0.08, "margin": 1.25,
    }  # fmt: skip
    return StepRecord(number, t_start, t_start, t_end, work, **values | fields)


def arrival(id: str, prompt_tokens: int = 10) -> Arrived:
    return Arrived(id, 0.0, prompt_tokens, 9, 0)


FIRST = step(0, 0.0, 0.1, [("a", 0, 10)], arrived=[arrival("a")])
HYBRID = step(1, 0.1, 0.3, [("a", 10, 1), ("b", 0, 30)], arrived=[arrival("b", 30)])
END = step(2, 0.3, 0.35, [("a", 11, 1), ("b", 30, 1)], finished=[Finished("a", "length")])


class Recorded(Live):
    """`Live` with an account of its own."""

    def __init__(self, policy: str = "sarathi", slo: Slo | None = None, ahead=None):
        super().__init__(policy, slo, ahead)
        self.account = StallAccount(slo)

    def keep(self, *steps: StepRecord) -> None:
        for record in steps:
            self.account.record(record)
            self.record(record, self.account)


@pytest.fixture
def live() -> Recorded:
    live = Recorded("sarathi", TBT)
    live.keep(FIRST, HYBRID, END)
    return live


def test_an_iteration_is_a_row(live):
    assert (1, 0.1, 0.3, 1, 30, 0.08, 64, 1.25, 2, 1, 9) == live.look(1.0)["rows"][1]


def test_rows_are_those_behind_what_the_page_has(live):
    assert [2] == [row[0] for row in live.look(1.0, since=1)["rows"]]
    assert [] == live.look(1.0, since=2)["rows"]
    assert [0, 1, 2] == [row[0] for row in live.look(1.0)["rows"]]


def test_first_tokens_and_gaps_are_percentiles_with_the_share_that_was_late(live):
    view = live.look(1.0)
    assert (2, 0.5, pytest.approx(0.1, rel=0.011), pytest.approx(0.3, rel=0.011)) == tuple(
        view["ttft"][name] for name in ("count", "late", "p50", "p99")
    )
    assert (3, pytest.approx(1 / 3), pytest.approx(0.05, rel=0.011), pytest.approx(0.2, rel=0.011)) == tuple(
        view["tbt"][name] for name in ("count", "late", "p50", "p90")
    )


def test_latencies_are_forgotten_after_a_minute(live):
    assert 3 == live.look(59.0)["tbt"]["count"]
    assert (None, None) == (live.look(62.0)["ttft"], live.look(62.0)["tbt"])


def test_a_late_token_has_its_cause_in_words(live):
    (stall,) = live.look(1.0)["stalls"]
    assert ("late", "prefill", "a", 1, 1) == tuple(stall[name] for name in ("kind", "cause", "id", "step", "count"))
    assert "step 1 took 200 ms for 1 decode and 30 prefill tokens of b" == stall["words"]


def test_all_that_one_iteration_delays_is_one_line_and_the_newest_comes_first(live):
    ids = [f"request-{i}" for i in range(5)]
    live.keep(step(3, 0.4, 0.5, [(id, 0, 10) for id in ids], arrived=[arrival(id) for id in ids]))
    live.keep(step(4, 0.5, 0.9, [(id, 10, 1) for id in ids]))
    newest, oldest = live.look(1.0)["stalls"]
    assert (4, "request-", 5, 1) == (newest["step"], newest["id"], newest["count"], oldest["count"])


def test_only_the_last_stalls_are_kept(live):
    for i in range(30):
        live.keep(step(3 + i, 1.0 + i, 2.0 + i, [("b", 31 + i, 1)]))
    assert list(range(32, 12, -1)) == [stall["step"] for stall in live.look(40.0)["stalls"]]


def test_without_a_look_only_the_last_records_are_kept_and_their_requests_are_still_known(monkeypatch):
    monkeypatch.setattr(module, "KEPT", 2)
    live = Recorded("sarathi", TBT)
    live.keep(FIRST, HYBRID, END, step(3, 0.35, 0.6, [("b", 31, 1)]))
    view = live.look(1.0)
    assert [2, 3] == [row[0] for row in view["rows"]]
    assert [0, 0] == [row[4] for row in view["rows"]]
    assert (None, 3) == (view["ttft"], view["tbt"]["count"])
    assert [3] == [stall["step"] for stall in view["stalls"]]


def test_one_look_takes_a_bounded_amount_of_work(live, monkeypatch):
    monkeypatch.setattr(module, "PIECES", 3)
    looks = [live.look(1.0, since) for since in (-1, 1)]
    assert [([0, 1], True), ([2], False)] == [([row[0] for row in view["rows"]], view["more"]) for view in looks]


def test_one_answer_holds_a_bounded_number_of_rows(live, monkeypatch):
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 2)
    first = live.look(1.0)
    second = live.look(1.0, first["rows"][-1][0])
    assert ([0, 1], True, [2], False) == (
        [row[0] for row in first["rows"]],
        first["more"],
        [row[0] for row in second["rows"]],
        second["more"],
    )


def test_a_server_without_a_target_reports_only_who_was_left_out():
    live = Recorded("prefill-first")
    live.keep(FIRST, step(1, 0.1, 9.0, [("b", 0, 30)], arrived=[arrival("b", 30)], stalled=["a"]))
    assert ["left out"] == [stall["kind"] for stall in live.look(10.0)["stalls"]]


def test_a_first_token_that_was_waited_for_long_is_shown_with_what_kept_it(live):
    (wait,) = live.look(1.0)["waits"]
    assert ("b", 1, 0.3) == (wait["id"], wait["step"], wait["seconds"])
    assert "others or a part of it got prefill" in wait["words"]


def test_who_still_waits_for_a_first_token_is_shown_while_it_waits():
    live = Recorded("slo", TBT)
    live.keep(FIRST)
    assert None is live.look(1.0)["longest_wait"]
    live.keep(step(1, 0.1, 0.2, [("a", 10, 1)], arrived=[arrival("patient-request"), arrival("later")]))
    assert {"id": "patient-", "seconds": 287.0} == live.look(287.0)["longest_wait"]
    assert 0.15 == live.look(287.0)["long_wait_s"]
    live.keep(step(2, 287.0, 287.1, [("patient-request", 0, 10)]))
    assert "later" == live.look(288.0)["longest_wait"]["id"]
    live.keep(step(3, 288.0, 288.1, [], finished=[Finished("later", "abort")]))
    assert None is live.look(289.0)["longest_wait"]


def tenants(*names: str):
    """A record in which a request of each arrives and gets ten tokens."""
    return step(
        0, 0.0, 0.1, [(name, 0, 10) for name in names], arrived=[arrival(name) for name in names],
        tenants=[(name, name, 3.0) for name in names],
    )  # fmt: skip


def test_each_tenant_is_a_row_with_its_share_of_the_last_minute():
    live = Recorded("slo")
    live.keep(tenants("acme", "crawler"), step(1, 0.1, 0.2, [("acme", 10, 20)]))
    acme, crawler = live.look(1.0)["tenants"]
    assert ("acme", 0.75, 3.0, None, 0, 0, None) == tuple(acme.values())
    assert ("crawler", 0.25) == (crawler["name"], crawler["share"])
    assert [] == [row for row in live.look(200.0)["tenants"] if row["share"]]


def test_a_tenant_has_the_share_of_its_tokens_that_were_cached():
    live = Recorded("slo")
    live.keep(replace(tenants("acme", "crawler"), cached=[("acme", 4), ("crawler", 0)]))
    assert [0.4, 0.0] == [row["cached"] for row in live.look(1.0)["tenants"]]
    assert [None, None] == [row["cached"] for row in live.look(200.0)["tenants"]]


def test_one_tenant_is_no_table():
    live = Recorded("slo")
    live.keep(tenants("acme"))
    assert [] == live.look(1.0)["tenants"]


def test_a_tenant_that_waits_or_was_refused_is_there_without_a_share():
    live = Recorded("slo")
    live.keep(tenants("acme"), step(1, 0.1, 0.2, [], arrived=[arrival("b")], tenants=[("b", "crawler", 1.0)]))
    live.refuse("greedy", 0.5)
    rows = {row["name"]: (row["share"], row["waiting"], row["refused"]) for row in live.look(1.0)["tenants"]}
    assert {"acme": (1.0, 0, 0), "crawler": (0.0, 1, 0), "greedy": (0.0, 0, 1)} == rows
    assert "greedy" not in [row["name"] for row in live.look(100.0)["tenants"]]


def test_the_credit_is_the_policys():
    live = Recorded("slo", ahead={"acme": 0.25, "crawler": 0.0}.__getitem__)
    live.keep(tenants("acme", "crawler"))
    assert [("acme", 0.25), ("crawler", 0.0)] == [(row["name"], row["ahead_s"]) for row in live.look(1.0)["tenants"]]


def test_however_many_tenants_come_few_are_shown(monkeypatch):
    monkeypatch.setattr(module, "MOST_TENANTS", 4)
    live = Recorded("slo")
    live.keep(tenants(*(f"t{number:02}" for number in range(50))))
    assert module.TENANTS == len(live.look(1.0)["tenants"])
    assert 4 == len(live._weights)


def test_forecasts_are_compared_with_what_came():
    live = Recorded("slo")
    live.keep(step(0, 0.0, 0.5, [("a", 0, 10)], arrived=[arrival("a")], predicted=[("a", 0.25)]))
    forecast = live.look(1.0)["forecast"]
    assert (1, pytest.approx(2, rel=0.02)) == (forecast["count"], forecast["p50"])
