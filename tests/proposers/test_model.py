"""A draft model guesses what it would say itself, keeps its KV in step with what the large model said, and may fail."""

import numpy as np
import pytest

from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity, StepResult
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.core.speculation import Speculation
from stallfree.executors.openvino import OpenVINOExecutor
from stallfree.executors.simulated import Linear
from stallfree.policies import load
from stallfree.proposers.guarded import FAILURES, Guarded
from stallfree.proposers.model import READ, DraftModel
from tests.composition.serving import write_model


class Sums:
    """An executor whose model says the sum of all tokens before, modulo 97: it is right only with the right KV. `fail` says how
    often it fails next."""

    def __init__(self, blocks: int = 64, longest: int = 2000):
        self.capacity = Capacity(8, blocks, longest)
        self.kv = np.full(blocks * 8, -1000, np.int64)
        self.fail, self.plans, self.closed = 0, [], False

    def submit(self, plan):
        self.plans.append(plan)

    def collect(self):
        plan = self.plans[-1]
        if self.fail:
            self.fail -= 1
            raise RuntimeError("no luck")
        tokens = {}
        for work in plan.work:
            for at, token in enumerate(work.tokens, work.start):
                self.kv[work.blocks[at // 8] * 8 + at % 8] = token
            if work.samples:
                end = work.start + work.count
                held = [self.kv[work.blocks[at // 8] * 8 + at % 8] for at in range(end)]
                tokens[work.id] = (int(sum(held)) % 97,)
        return StepResult(plan.step, tokens, 0.001)

    def close(self):
        self.closed = True


def said(tokens, count):
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(sum(tokens) % 97)
    return tokens[-count:]


def request(prompt, max_tokens=60, id="a"):
    return Request(id, prompt, max_tokens)


def test_it_guesses_what_it_says_after_all_tokens_so_far():
    draft, r = DraftModel(Sums()), request(range(20))
    assert [said(range(20), 4)] == draft.propose([r], [4])
    r.append([5, 6], 0)  # the large model said something else
    assert [said([*range(20), 5, 6], 3)] == draft.propose([r], [3])
    right = said([*range(20), 5, 6], 2)
    r.append(right, 0)  # the first two guesses were right: their KV is there
    before = len(draft._executor.plans)
    assert [said([*range(20), 5, 6, *right], 3)] == draft.propose([r], [3])
    assert 1 == draft._executor.plans[before].work[0].count


def test_several_requests_share_its_iterations():
    sums = Sums()
    draft = DraftModel(sums)
    a, b = request(range(20)), request(range(5, 17), id="b")
    before = len(sums.plans)
    assert [said(range(20), 3), said(range(5, 17), 1)] == draft.propose([a, b], [3, 1])
    assert [2, 1, 1] == [len(plan.work) for plan in sums.plans[before:]]


def test_a_long_prompt_is_read_in_parts():
    sums = Sums(200)
    draft, long, short = DraftModel(sums), request([1] * 300), request(range(9), id="b")
    assert [(), said(range(9), 2)] == [tuple(draft.propose([long], [2])[0]), draft.propose([short], [2])[0]]
    rounds = 1
    while not (guess := draft.propose([long], [2])[0]):
        rounds += 1
    assert said([1] * 300, 2) == guess
    assert -(-300 // READ) - 1 == rounds
    assert all(plan.num_tokens <= READ for plan in sums.plans)


def test_without_room_there_is_no_guess_and_what_has_ended_leaves_its_room():
    scheduler = Scheduler(load("sarathi"), Capacity(8, 100, 400), Limits())
    draft = DraftModel(Sums(blocks=6))
    a, b = request(range(30)), request(range(20), id="b")
    for r in (a, b):
        scheduler.submit(r)
    assert [said(range(30), 2), []] == draft.propose([a, b], [2, 2])
    scheduler.abort("a")
    assert [said(range(20), 2)] == draft.propose([b], [2])
    assert [[]] == DraftModel(Sums(longest=16)).propose([request(range(20))], [2]), "it reads no further than its context"


def test_a_draft_model_that_fails_is_done_without_and_asked_no_more_if_it_goes_on(caplog):
    sums = Sums()
    draft, r = Guarded(DraftModel(sums), "the draft model"), request(range(20))
    sums.fail = FAILURES - 1
    for _ in range(FAILURES - 1):
        assert [()] == draft.propose([r], [3])
    assert "the iteration goes on without its guesses" in caplog.text
    assert [tuple(said(range(20), 3))] == draft.propose([r], [3])
    sums.fail = 100
    for _ in range(FAILURES + 2):
        assert not draft.propose([r], [3])[0]
    assert 100 - FAILURES == sums.fail
    assert "it is asked no more" in caplog.text
    draft.close()
    assert sums.closed


@pytest.mark.parametrize(
    "answer",
    [[], [(1,), (2,)], [5], [("a",)], [(1.5,)], None],
    ids=["none", "too many", "a number", "texts", "no whole numbers", "None"],
)
def test_answers_that_are_no_guesses_count_as_failures(answer, caplog):
    class Mine:
        draft_s = 0.0

        def propose(self, requests, most):
            return answer

    assert [()] == Guarded(Mine(), "mine.py:Mine").propose([request([1])], [3])
    assert "mine.py:Mine failed; the iteration goes on without its guesses" in caplog.text


def test_a_guess_is_cut_to_what_was_wanted():
    class Mine:
        draft_s = 0.0

        def propose(self, requests, most):
            return [[1, 2, 3, 4]]

    assert [(1, 2)] == Guarded(Mine(), "mine").propose([request([1])], [2])


@pytest.mark.parametrize("same", [True, False])
def test_a_real_draft_model_changes_no_token(tmp_path, same):
    """With its own weights every guess is right; with others hardly any is, and soon few are asked for."""
    large = OpenVINOExecutor(write_model(tmp_path / "large"), weights="f32", kv="f32", kv_bytes=4 << 20)
    small = OpenVINOExecutor(write_model(tmp_path / "small", 0 if same else 9), weights="f32", kv="f32", kv_bytes=4 << 20)

    def served(speculation):
        scheduler = Scheduler(load("sarathi"), large.capacity, speculation=speculation)
        requests = [request([(7 * i + 3 * n) % 250 for i in range(20 + 9 * n)], 30, str(n)) for n in range(3)]
        for r in requests:
            scheduler.submit(r)
        iterations = 0
        while scheduler.ledger.requests:
            plan = scheduler.schedule(0)
            large.submit(plan)
            scheduler.complete(plan, large.collect(), 0)
            iterations += 1
        scheduler.ledger.check()
        return [r.output for r in requests], iterations

    alone, many = served(None)
    draft = DraftModel(small)
    draft.draft_s = 0.01
    speculation = Speculation(draft, Linear(1.0, 0.0, 0.0), 5)
    guessed, few = served(speculation)
    assert alone == guessed
    if same:
        assert speculation.accepted == speculation.drafted > 0
        assert few < many / 3
    else:
        assert speculation.drafted > 0
    large.close()
    small.close()
