"""Who is here, and what was computed for whom, in a few records."""

from stallfree.core.record import Arrived, Finished, StepRecord
from stallfree.metrics.stalls import StallAccount


def arrived(id: str) -> Arrived:
    return Arrived(id, 0.0, 10, 9, 0)


def step(number: int, work, **fields) -> StepRecord:
    """An iteration in which all get a token."""
    values = {
        "emitted": [id for id, _, _ in work], "cached": [], "arrived": [], "finished": [], "preempted": [], "stalled": [],
        "num_running": 2, "num_waiting": 1, "free_blocks": 9, "budget": 64, "reason": "",
    }  # fmt: skip
    return StepRecord(number, number, number, number + 1.0, work, **values | fields)


def judged(*steps: StepRecord) -> StallAccount:
    account = StallAccount()
    for record in steps:
        account.record(record)
    return account


BOTH = step(
    0, [("a", 0, 10), ("b", 0, 4)], emitted=["a"], arrived=[arrived("a"), arrived("b"), arrived("c")],
    tenants=[("a", "acme", 3.0), ("b", "crawler", 1.0)],
)  # fmt: skip


def test_tokens_are_counted_for_whom_they_were_computed():
    assert {"acme": 10, "crawler": 4} == judged(BOTH).served
    assert {"acme": 1, "": 10} == judged(BOTH, step(1, [("a", 10, 1), ("c", 0, 10)])).served


def test_without_tenants_nothing_is_counted():
    assert {} == judged(step(0, [("a", 0, 10)], arrived=[arrived("a")])).served


def test_those_who_wait_have_no_first_token():
    here = judged(BOTH).tenants.here
    assert {"acme": (3.0, 1, 0), "crawler": (1.0, 1, 1), "": (1.0, 1, 1)} == {
        name: (tenant.weight, tenant.present, tenant.waiting) for name, tenant in here.items()
    }


def test_a_tenant_is_forgotten_with_its_last_request():
    ends = step(1, [], finished=[Finished("a", "length"), Finished("b", "abort")])
    assert {""} == judged(BOTH, ends).tenants.here.keys()


def test_a_weight_is_that_of_the_last_request():
    again = step(1, [], arrived=[arrived("d")], tenants=[("d", "acme", 5.0)])
    assert 5.0 == judged(BOTH, again).tenants.here["acme"].weight
