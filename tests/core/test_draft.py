"""A draft refuses what would break it, whatever a policy asks for. It says where a partly cached prompt begins."""

import pytest

from stallfree.core import transfer
from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from tests.virtual import answer


class Scripted:
    """A policy that does what `verbs` says, one function of the draft for each iteration."""

    reserve = "prompt"
    stall_free = False

    def __init__(self, *verbs):
        self.verbs = list(verbs)
        self.results = []

    def plan(self, draft):
        self.results.append(self.verbs.pop(0)(draft))


def admit_all(draft):
    return [draft.admit(r) for r in draft.waiting]


def scheduler(policy, *, max_seqs=16, max_tokens=16, reuse=True):
    return Scheduler(policy, Capacity(4, 100, 200), Limits(max_seqs, max_tokens), reuse=reuse)


def step(s):
    plan = s.schedule(0.0)
    if plan.work:
        s.complete(plan, answer(plan), 0.0)
    s.ledger.check()
    return plan


def streams(s, count, length=1):
    """Submit `count` requests that become ready decodes."""
    for i in range(count):
        s.submit(Request(f"r{i}", range(1000 * i, 1000 * i + length), 50))


def test_a_decode_is_planned_once():
    s = scheduler(Scripted(admit_all, lambda draft: [draft.decode(draft.decoding[0]) for _ in range(3)]))
    streams(s, 1)
    step(s)
    assert 1 == len(step(s).work)
    assert [True, False, False] == s.policy.results[1]


def test_decodes_end_where_the_token_limit_does():
    s = scheduler(Scripted(admit_all, lambda draft: (draft.cap(3, "few"), [draft.decode(r) for r in draft.decoding])))
    streams(s, 5)
    step(s)
    plan = step(s)
    assert (3, ("r3", "r4")) == (plan.num_tokens, plan.stalled)


def test_a_decode_after_a_full_chunk_finds_no_token_left():
    """Chunks of 16 tokens fill an iteration of 16; two decodes more would be 18."""
    verbs = Scripted(admit_all, lambda draft: ([draft.admit(r) for r in draft.waiting], [draft.decode(r) for r in draft.decoding]))
    s = scheduler(verbs)
    streams(s, 2)
    step(s)
    s.submit(Request("long", range(5000, 5040), 5))
    assert 16 == step(s).num_tokens


def test_a_prompt_in_prefill_is_no_decode():
    s = scheduler(Scripted(admit_all, lambda draft: [draft.decode(r) for r in draft.prefilling]))
    s.submit(Request("long", range(40), 5))
    step(s)
    assert () == step(s).work
    assert [False] == s.policy.results[1]


def test_the_last_token_of_a_prompt_is_no_decode():
    s = scheduler(Scripted(admit_all, lambda draft: [draft.decode(r) for r in draft.running]))
    s.submit(Request("p", range(17), 5))
    step(s)
    assert () == step(s).work


def test_a_request_that_has_ended_or_waits_is_no_decode():
    done, waiting = Request("done", range(3), 1), Request("waiting", range(100, 103), 5)
    s = scheduler(Scripted(admit_all, lambda draft: [draft.decode(r) for r in (done, waiting)]))
    s.submit(done)
    step(s)
    s.submit(waiting)
    step(s)
    assert [False, False] == s.policy.results[1]


def test_only_who_waits_in_this_queue_is_admitted():
    stranger, elsewhere = Request("stranger", range(3), 1), Request("elsewhere", range(100, 103), 5)
    s = scheduler(Scripted(lambda draft: [draft.admit(r) for r in (stranger, elsewhere)]))
    transfer.expect(s.ledger, elsewhere)
    step(s)
    assert [0, 0] == s.policy.results[0]
    assert not s.ledger.running


def test_a_prompt_whose_kv_comes_from_elsewhere_gets_no_work():
    s = scheduler(Scripted(lambda draft: [(draft.decode(r), draft.prefill(r)) for r in draft.running]))
    transfer.expect(s.ledger, Request("elsewhere", range(9), 5))
    assert transfer.admit(s.ledger) is not None
    step(s)
    assert [(False, 0)] == s.policy.results[0]


def test_a_limit_below_nothing_is_nothing():
    s = scheduler(Scripted(lambda draft: (draft.cap(-5, "spite"), admit_all(draft))))
    streams(s, 1)
    assert (0, ()) == ((plan := step(s)).budget, plan.work)


@pytest.mark.parametrize("cached", [0, 4, 8, 36])
def test_a_chunk_begins_behind_what_is_cached_of_the_prompt(cached):
    s = scheduler(Scripted(admit_all, lambda draft: [draft.start(r) for r in draft.waiting], admit_all), max_tokens=64)
    s.submit(Request("first", range(40), 1))
    step(s)
    s.submit(Request("second", [*range(cached), *range(500, 540)][:40], 1))
    step(s)
    assert [cached] == s.policy.results[1]
    assert (("second", cached),) == step(s).cached


def test_looking_changes_nothing():
    s = scheduler(Scripted(admit_all, *[lambda draft: [draft.start(r) for r in draft.waiting]] * 3), max_tokens=64)
    s.submit(Request("first", range(40), 1))
    step(s)
    request = Request("second", range(40), 1)
    s.submit(request)
    free = s.ledger.pool.num_free
    for _ in range(3):
        step(s)
    assert [[36]] * 3 == s.policy.results[1:]
    assert (free, [], 0) == (s.ledger.pool.num_free, request.blocks, request.num_shared)


def test_what_is_evicted_between_two_looks_is_not_cached_any_more():
    look = lambda draft: [draft.start(r) for r in draft.waiting if r.id == "second"]  # noqa: E731
    admit = lambda draft: [draft.admit(r) for r in draft.waiting if r.id != "second"]  # noqa: E731
    s = Scheduler(Scripted(admit, look, admit, look), Capacity(4, 12, 48), Limits(16, 64))
    s.submit(Request("first", range(40), 1))
    step(s)
    s.submit(Request("second", range(40), 1))
    step(s)
    s.submit(Request("third", range(900, 944), 1))
    step(s)
    step(s)
    assert [36] == s.policy.results[1]
    assert s.policy.results[3][0] < 36


def test_what_another_pool_had_of_a_request_does_not_count():
    first, second = (scheduler(Scripted(admit_all, lambda d: [d.start(r) for r in d.waiting]), max_tokens=64) for _ in range(2))
    second.policy.verbs.pop(0)
    first.submit(Request("first", range(40), 1))
    step(first)
    request = Request("moved", range(40), 1)
    first.submit(request)
    step(first)
    transfer.release(first.ledger, "moved")
    second.submit(request)
    step(second)
    assert ([36], [0]) == (first.policy.results[1], second.policy.results[0])
