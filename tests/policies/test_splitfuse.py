"""The policy fills iterations to a fixed total, lets requests without room wait, and recomputes the last one only if all wait."""

import pytest

from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity, Plan
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.policies import load
from stallfree.policies.splitfuse import Splitfuse
from tests.policies.test_contract import load_of_a_busy_minute
from tests.virtual import answer, run


def scheduler(token_budget: int, num_blocks: int, *sizes: tuple[int, int]) -> Scheduler:
    """With requests a, b, ... of these (prompt tokens, output tokens). Blocks have four tokens."""
    s = Scheduler(Splitfuse(token_budget), Capacity(4, num_blocks, 1024), Limits(32, 512, watermark=0.0))
    for number, (prompt, output) in enumerate(sizes):
        s.submit(Request("abcdefgh"[number], range(1000 * number, 1000 * number + prompt), output, arrival=float(number)))
    return s


def step(s: Scheduler) -> Plan:
    plan = s.schedule(0.0)
    s.complete(plan, answer(plan), 0.0)
    s.ledger.check()
    return plan


def work(plan: Plan) -> list[tuple[str, int]]:
    return [(w.id, w.count) for w in plan.work]


def test_decodes_come_first_and_prompts_in_order_fill_the_total():
    s = scheduler(16, 100, (10, 9), (30, 9), (30, 9))
    plans = [work(step(s)) for _ in range(6)]
    assert [
        [("a", 10), ("b", 6)],
        [("a", 1), ("b", 15)],
        [("a", 1), ("b", 9), ("c", 6)],
        [("a", 1), ("b", 1), ("c", 14)],
        [("a", 1), ("b", 1), ("c", 10)],
        [("a", 1), ("b", 1), ("c", 1)],
    ] == plans


def test_decodes_beyond_the_total_are_left_out():
    s = scheduler(4, 100, *[(1, 9)] * 6)
    plans = [step(s) for _ in range(2)]
    assert [4, 4] == [plan.num_tokens for plan in plans]


def test_a_prompt_is_not_begun_without_room_for_all_of_it():
    """A chunk would fit into the four blocks that are free; the whole prompt needs five."""
    s = scheduler(12, 6, (8, 3), (20, 1))
    assert [[("a", 8)], [("a", 1)], [("a", 1)], [("b", 12)]] == [work(step(s)) for _ in range(4)]


def test_a_begun_prompt_waits_while_there_is_no_room_for_its_rest():
    s = scheduler(5, 6, (4, 12), (17, 1))
    first, *waiting = [work(step(s)) for _ in range(12)]
    assert [("a", 4), ("b", 1)] == first
    assert [[("a", 1)]] * 11 == waiting
    assert [("b", 5)] == work(step(s))


def test_a_decode_without_room_waits_and_preempts_nobody():
    s = scheduler(16, 4, (7, 9), (5, 9))
    plans = [step(s) for _ in range(4)]
    assert [["a", "b"], ["a", "b"], ["b"], ["b"]] == [[w.id for w in plan.work] for plan in plans]
    assert [(), (), ("a",), ("a",)] == [plan.stalled for plan in plans]
    assert 0 == sum(len(plan.preempted) for plan in plans)


def test_if_nobody_has_room_the_last_is_recomputed_later():
    s = scheduler(16, 4, (7, 9), (5, 9))
    requests = list(s.ledger.requests.values())
    plans = [step(s) for _ in range(4)]
    while s.ledger.requests:
        plans.append(step(s))
    assert [("b",)] == [plan.preempted for plan in plans if plan.preempted]
    assert [("a", 1)] == work(plans[4])
    assert [list(range(len(r.prompt), len(r.prompt) + 9)) for r in requests] == [r.output for r in requests]


def test_with_enough_kv_it_plans_what_sarathi_does():
    roomy = Capacity(16, 5000, 1024)
    ours, theirs = (run(load(name, token_budget=256), load_of_a_busy_minute(), roomy) for name in ("splitfuse", "sarathi"))
    assert [r.work for r in theirs] == [r.work for r in ours]


def test_without_a_budget_it_has_that_of_deepspeed_mii():
    assert 768 == load("splitfuse").token_budget


def test_a_budget_below_one_token_is_refused():
    with pytest.raises(ValueError, match="token_budget is 0"):
        load("splitfuse", token_budget=0)
