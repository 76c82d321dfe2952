"""Speculation in the simulator: as quick as the arithmetic says, its time charged, and no token more or less."""

from dataclasses import replace
from itertools import pairwise

import pytest

from stallfree.core.request import Request
from stallfree.sim.deployment import Deployment, Split
from stallfree.sim.guesses import WRONG, Chance
from stallfree.sim.replica import script
from stallfree.sim.simulator import Simulator
from stallfree.sim.split import SplitSimulator
from stallfree.workload.workload import Arrival

BASE = Deployment(model="llama3-8b", hardware="h100", policy="sarathi", token_budget=512)
ONE = [Arrival(0.0, 512, 1500)]


def seconds(deployment, arrivals=ONE):
    """From the first token of the first request to its last."""
    run = Simulator(deployment).run(arrivals)
    (line, *_) = run.lines
    return line.tokens[-1] - line.tokens[0], run


def test_each_guess_is_right_with_the_same_probability_by_itself():
    r = script(Request("a", range(10), 20_000), [-2] * 20_000)
    (guess,) = Chance(0.7).propose([r], [20_000])
    right = [token != WRONG for token in guess]
    assert 0.7 == pytest.approx(sum(right) / 20_000, abs=0.01)
    after_right = [b for a, b in pairwise(right) if a]
    assert 0.7 == pytest.approx(sum(after_right) / len(after_right), abs=0.015)
    assert (guess,) == tuple(Chance(0.7).propose([r], [20_000])), "and is the same in every run"


def test_a_stream_is_quicker_and_gets_as_many_tokens():
    alone, plain = seconds(BASE)
    guessed, run = seconds(replace(BASE, draft_acceptance=0.8, draft_tokens=5))
    assert alone / guessed == pytest.approx((1 - 0.8**6) / 0.2, rel=0.08)
    assert [1500] == [len(line.tokens) for line in run.lines] == [len(line.tokens) for line in plain.lines]
    assert run.iterations < plain.iterations / 3


def test_what_is_never_right_is_hardly_checked_and_costs_little():
    alone, _ = seconds(BASE)
    assert seconds(replace(BASE, draft_acceptance=0.0))[0] <= 1.03 * alone


def test_the_time_of_the_model_that_guesses_is_charged():
    free, _ = seconds(replace(BASE, draft_acceptance=0.8))
    by_small, _ = seconds(replace(BASE, draft_acceptance=0.8, draft_model="llama3.2-1b"))
    by_itself, _ = seconds(replace(BASE, draft_acceptance=0.8, draft_model="llama3-8b"))
    alone, _ = seconds(BASE)
    assert free < by_small < alone
    assert by_itself == pytest.approx(alone, rel=0.03), "what takes as long as it saves is not asked"


@pytest.mark.parametrize("policy", ["slo", "vtc"])
def test_records_of_a_simulated_run_have_drafts(policy):
    deployment = Deployment(model="llama3-8b", hardware="h100", policy=policy, draft_acceptance=0.9)
    run = Simulator(deployment).run([Arrival(0.1 * n, 300, 100) for n in range(8)], records=True)
    (records,) = run.records
    assert any(record.drafted for record in records)
    assert 800 == sum(len(record.emitted) for record in records)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"draft_acceptance": 1.2}, "--draft-acceptance 1.2 is no probability; give one from 0 to 1"),
        ({"draft_acceptance": -0.1}, "--draft-acceptance -0.1 is no probability"),
        ({"draft_acceptance": 0.5, "draft_tokens": 0}, "--draft-tokens 0 is not possible; take 1 to 15"),
        ({"draft_acceptance": 0.5, "draft_tokens": 64}, "--draft-tokens 64 is not possible"),
        ({"draft_model": "llama3.2-1b"}, "--draft-model: say how often its guesses are right"),
        ({"draft_acceptance": 0.5, "draft_model": "llama3.2-1"}, "llama3.2-1"),
    ],
)
def test_what_is_wrong_is_named(change, says):
    with pytest.raises(ValueError, match=says):
        Simulator(replace(BASE, **change))


def test_two_pools_guess_nothing():
    guessing = replace(BASE, draft_acceptance=0.5)
    with pytest.raises(ValueError, match="two pools guess no tokens"):
        SplitSimulator(Split(BASE, guessing, nodes=1))
