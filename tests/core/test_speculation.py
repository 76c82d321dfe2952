"""Drafts change what an iteration yields and never what a request gets; as many are checked as are worth their time."""

import itertools
from dataclasses import replace

import pytest

from stallfree.core.ledger import Limits
from stallfree.core.plan import UNKNOWN, Capacity, StepResult, Work
from stallfree.core.record import StepRecord
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.core.speculation import MOST, Guess, Speculation
from stallfree.policies import load
from stallfree.proposers.ngram import INDEXED, Ngram
from tests.virtual import Cost, answer

ROOMY = Capacity(16, 1000, 4096)


class Flat:
    """An iteration takes a second, and `token_s` more for each token."""

    def __init__(self, token_s=0.0):
        self.token_s = token_s

    def seconds(self, shape):
        return 1 + self.token_s * sum(count for _, count in shape if count > 0)


class Oracle:
    """Knows that the token at position p is p, and says -1 for positions in `wrong`. `asked` counts the tokens."""

    def __init__(self, wrong=(), draft_s=0.0):
        self.wrong, self.draft_s, self.asked = wrong, draft_s, 0

    def propose(self, requests, most):
        self.asked += sum(most)
        return [
            tuple(-1 if p in self.wrong else p for p in range(r.num_tokens, r.num_tokens + count))
            for r, count in zip(requests, most, strict=True)
        ]


def scheduler(proposer=None, cost=None, capacity=ROOMY, policy="sarathi", most=7, **limits):
    return Scheduler(load(policy), capacity, Limits(**limits), speculation=Speculation(proposer or Oracle(), cost or Flat(), most))


def first_token(s, *requests):
    """Serve `requests` up to their first tokens."""
    for request in requests:
        s.submit(request)
    while not all(request.output for request in requests):
        step(s)


def step(s):
    plan = s.schedule(0)
    s.complete(plan, answer(plan), 0)
    s.ledger.check()
    return plan


def test_an_iteration_yields_the_drafts_that_were_right_and_one_more():
    s, r = scheduler(Oracle(wrong={13})), Request("a", range(10), 50)
    first_token(s, r)
    plan = s.schedule(0)
    assert (10, 8, (10, 11, 12, -1, 14, 15, 16, 17)) == (plan.work[0].start, plan.work[0].count, plan.work[0].tokens)
    assert plan.work[0].decode
    s.complete(plan, answer(plan), 0)
    assert [10, 11, 12, 13] == r.output
    assert (13, 13) == (r.num_computed, r.num_planned)
    assert (7, 2) == (s.speculation.drafted, s.speculation.accepted)


def test_a_record_has_an_id_for_each_token_and_the_number_of_drafts():
    s, r = scheduler(), Request("a", range(10), 50)
    first_token(s, r)
    plan = s.schedule(0)
    result = answer(plan)
    s.complete(plan, result, 0)
    record = StepRecord.of(plan, result, s.ledger, (0, 0, 1), [], [])
    assert (["a"] * 8, [("a", 7)]) == (record.emitted, record.drafted)
    assert record == StepRecord.from_json(record.to_json())


@pytest.mark.parametrize(("stop", "got"), [({13}, 4), ({10_000}, 6)])
def test_tokens_after_the_end_do_not_count(stop, got):
    s, r = scheduler(most=15), Request("a", range(10), 6, stop_ids=frozenset(stop))
    first_token(s, r)
    plan = s.schedule(0)
    assert plan.work[0].count <= 5, "drafts beyond the last token are of no use"
    result = answer(plan)
    done, _ = s.complete(plan, result, 0)
    assert ([r], got) == (done, len(r.output))
    assert ["a"] * (got - 1) == StepRecord.of(plan, result, s.ledger, (0, 0, 1), [], done).emitted
    assert s.ledger.pool.num_free == ROOMY.num_blocks


def test_kv_of_wrong_drafts_is_taken_back():
    s, r = scheduler(Oracle(wrong={17}), most=15), Request("a", range(15), 50)
    first_token(s, r)
    s.schedule(0)
    assert 2 == len(r.blocks)
    s = scheduler(Oracle(wrong={16}), capacity=Capacity(4, 100, 200), most=15)
    r = Request("a", range(15), 50)
    first_token(s, r)
    plan = s.schedule(0)
    assert 8 == len(r.blocks)
    s.complete(plan, answer(plan), 0)
    assert ([15, 16], 5) == (r.output, len(r.blocks))


def test_drafts_take_no_kv_from_anybody():
    capacity = Capacity(4, 9, 32)
    s = scheduler(capacity=capacity, most=15)
    requests = [Request(id, range(10), 12, arrival=n) for n, id in enumerate("ab")]
    first_token(s, *requests)
    preemptions = 0
    while s.ledger.requests:
        step(s)
        preemptions += sum(r.num_preemptions for r in requests)
    assert all(list(range(10, 22)) == r.output for r in requests)
    without = Scheduler(load("sarathi"), capacity)
    again = [Request(id, range(10), 12, arrival=n) for n, id in enumerate("ab")]
    for r in again:
        without.submit(r)
    while without.ledger.requests:
        plan = without.schedule(0)
        without.complete(plan, answer(plan), 0)
    assert [r.num_preemptions for r in requests] <= [r.num_preemptions for r in again]


def test_none_are_checked_where_every_token_costs_as_much():
    """Past the ridge, a draft costs what it brings, or more."""
    s = scheduler(Oracle(), Flat(100.0))
    first_token(s, r := Request("a", range(10), 50))
    assert 1 == step(s).work[0].count
    assert r.guess.tries > 0, "guesses are compared all the same"


def test_wrong_guesses_are_soon_checked_no_more_and_right_ones_again():
    wrong = set(range(20, 60))
    s, r = scheduler(Oracle(wrong), Flat(0.3)), Request("a", range(10), 200)
    first_token(s, r)
    counts = {}
    while r.num_tokens < 150:
        position = r.num_tokens
        counts[position] = step(s).work[0].count
    assert counts[11] > 1
    assert all(counts[p] == 1 for p in range(40, 60))
    assert max(count for p, count in counts.items() if p > 100) > 4


def test_no_more_are_checked_than_the_iteration_may_take():
    s = scheduler(cost=Flat(0.1))
    first_token(s, Request("a", range(10), 50))

    class Tight(type(s.policy)):
        def plan(self, draft):
            super().plan(draft)
            draft.limit_s, draft.margin = 1.5, 1.2

    s.policy = Tight(512)
    # 1 + 0.1 x 3 s times the margin is 1.56 s.
    assert 2 == s.schedule(0).work[0].count


def test_drafts_are_charged_to_the_budget():
    s = scheduler()
    s.policy.token_budget = 5
    first_token(s, Request("a", range(5), 50))
    assert 5 == s.schedule(0).num_tokens


def test_a_proposer_that_takes_time_is_asked_for_what_is_checked_only():
    oracle = Oracle(draft_s=0.01)
    s = scheduler(oracle)
    first_token(s, r := Request("a", range(10), 500))
    asked = oracle.asked
    assert asked == 0
    plan = step(s)
    assert oracle.asked == plan.work[0].count - 1 > 0
    s = scheduler(Oracle(draft_s=5.0))  # a guess takes longer than an iteration
    first_token(s, Request("a", range(10), 500))
    assert 1 == step(s).work[0].count
    assert 0 == s.speculation.proposer.asked
    assert r.output


def test_with_overlap_a_stream_that_is_guessed_well_is_not_planned_ahead_and_others_are():
    s = scheduler(Oracle(), capacity=replace(ROOMY, depth=2, overlap=True))
    a, b = Request("a", range(10), 60), Request("b", range(300), 60)
    s.speculation.proposer.wrong = set(range(300, 400))
    s.submit(a)
    s.submit(b)
    plans, unknown, drafted = [], {"a": 0, "b": 0}, {"a": 0, "b": 0}
    for _ in range(200):
        while len(plans) < 2 and (plan := s.schedule(0)).work:
            plans.append(plan)
            for work in plan.work:
                unknown[work.id] += work.tokens == (UNKNOWN,)
                drafted[work.id] += len(work.drafts)
        if not plans:
            break
        plan = plans.pop(0)
        s.complete(plan, answer(plan), 0)
        s.ledger.check()
    assert list(range(10, 70)) == a.output
    assert list(range(300, 360)) == b.output
    assert drafted["a"] > 30
    assert unknown["b"] > 40
    assert unknown["a"] < 10


def test_a_deferred_request_with_drafts_computes_its_token_again():
    s, r = scheduler(), Request("a", range(10), 50)
    first_token(s, r)
    plan = s.schedule(0)
    s.complete(plan, StepResult(plan.step, {}, 0, deferred={"a"}), 0)
    s.ledger.check()
    assert (10, 10, [10]) == (r.num_computed, r.num_planned, r.output)
    step(s)
    assert list(range(10, 19)) == r.output


def test_guesses_that_the_model_does_not_have_are_left_out():
    s = Scheduler(load("sarathi"), ROOMY, speculation=Speculation(Oracle(), Flat(), 7, vocab_size=14))
    first_token(s, Request("a", range(10), 50))
    assert (10, 11, 12, 13) == s.schedule(0).work[0].tokens


@pytest.mark.parametrize("most", [0, MOST + 1, 64])
def test_an_impossible_number_of_drafts_is_refused(most):
    with pytest.raises(ValueError, match=f"{most} draft tokens are not possible; take 1 to {MOST}"):
        Speculation(Oracle(), Flat(), most)


def test_the_mean_accepted_length_is_the_closed_form():
    """(1 - a^(k+1)) / (1 - a) tokens an iteration (Leviathan et al. 2023), if each guess is right with probability a."""
    import random

    for a, k in itertools.product((0.5, 0.7, 0.9), (1, 3, 7)):
        rng = random.Random(1)
        s = scheduler(Oracle(wrong={p for p in range(40_000) if rng.random() >= a}), Flat(), Capacity(16, 4000, 60_000), most=k)
        r = Request("a", range(10), 30_000)
        first_token(s, r)
        iterations = 0
        while s.ledger.requests:
            step_ = s.schedule(0)
            s.complete(step_, answer(step_), 0)
            iterations += 1
        assert (1 - a ** (k + 1)) / (1 - a) == pytest.approx(30_000 / iterations, rel=0.02)


def guessed(request, most=8):
    request.guess = request.guess or Guess()
    return Ngram().propose([request], [most])[0]


def test_ngram_copies_what_followed_the_last_tokens_before():
    r = Request("a", [1, 2, 3, 4, 5, 6, 7, 1, 2, 3], 100)
    assert (4, 5, 6, 7, 1) == guessed(r, 5)
    r.append([4, 5], 0)
    assert (6, 7) == guessed(r, 2)
    r.append([9], 0)
    assert () == guessed(r)
    r.append([5, 6, 7], 0)
    assert (1, 2, 3, 4, 5, 9) == guessed(r, 6)


def test_ngram_goes_on_where_it_copies_from_although_the_words_came_again_later():
    r = Request("a", [1, 2, 3, 10, 11, 12, 1, 2, 3, 20, 21, 5, 10, 11, 12], 100)
    assert (1, 2, 3, 20) == guessed(r, 4)
    r.append([1, 2, 3], 0)
    assert 20 == guessed(r)[0]


def test_ngram_repeats_what_repeats_itself():
    assert (1, 2, 3, 1, 2, 3, 1, 2) == guessed(Request("a", [1, 2, 3] * 3, 100))


@pytest.mark.parametrize("prompt", [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]])
def test_ngram_has_no_guess_without_a_past(prompt):
    assert () == guessed(Request("a", prompt, 10))


def test_ngram_reads_a_long_prompt_in_parts():
    r = Request("a", [*range(3 * INDEXED - 10), 0, 1, 2], 10)
    asked = 0
    while not (tokens := guessed(r)):
        asked += 1
    assert (3, 4, 5) == tokens[:3]
    assert 2 == asked


def test_a_work_tells_its_drafts_and_what_counts():
    work = Work("a", 4, 3, True, True, (7, 8, 9), (0,), None, "", (), ())
    assert (8, 9) == work.drafts
    for sampled, counts in (((8, 9, 10), (8, 9, 10)), ((8, 5, 10), (8, 5)), ((5, 9, 10), (5,)), ((8,), (8,))):
        assert counts == work.verified(sampled)
    chunk = work._replace(decode=False)
    assert () == chunk.drafts
    assert (8,) == chunk.verified((8, 9))


def test_prices_include_a_row_for_each_draft():
    s = scheduler()
    first_token(s, Request("a", range(10), 50))
    plan = s.schedule(0)
    assert [(10, 8), (7, 0)] == plan.shape
    assert [(10, 1)] == plan.decodes
    assert Cost().seconds(plan.shape) > Cost().seconds(plan.decodes)
