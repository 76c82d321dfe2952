"""A constraint leaves tokens out, on the host, on a device and over the wire, and fails its own request alone."""

from collections.abc import Sequence

import numpy as np
import pytest

from stallfree.core.plan import Plan
from stallfree.executors.sampling import Rows, Sampling, begin_constraints, of_values, ready_rows, sample, to_values
from tests.executors.test_sampler import rows, work


class Even:
    """Allows even tokens that are at least as large as the number of tokens so far; none from 50 on."""

    def __init__(self, size: int = 50, slow: bool = False):
        self.size, self.slow = size, slow
        self.begun: list[int] = []

    def begin(self, output: Sequence[int], drafts: Sequence[int] = ()) -> None:
        self.begun.append(len(output))

    def ready(self, wait_s: float) -> bool:
        return not self.slow

    def mask(self, output: Sequence[int]) -> np.ndarray:
        if len(output) >= 50:
            raise ValueError("nothing may follow")
        tokens = np.arange(self.size)
        return np.where((tokens % 2 == 0) & (tokens >= len(output)), 0, -np.inf).astype(np.float32)


def constrained(row: int, position: int, **more: object):
    return work(row, Sampling(constraint=Even(), seed=row, **more), position)._replace(prompt=(1,), output=[3] * position)


@pytest.mark.parametrize(
    "how", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 3}, {"logprobs": 2}, {"presence_penalty": 0.5}]
)
def test_only_allowed_tokens_are_sampled(how):
    logits = rows(40)
    works = [constrained(row, row, **how) for row in range(40)]
    tokens, _, failed = sample(logits, works)
    assert {} == failed
    for row in range(40):
        (token,) = tokens[str(row)]
        assert token % 2 == 0
        assert token >= row


def test_the_largest_allowed_logit_wins_if_greedy():
    logits = rows(1)
    ((token,),) = sample(logits, [constrained(0, 10, temperature=0.0)])[0].values()
    allowed = np.flatnonzero(Even().mask([3] * 10) == 0)
    assert allowed[logits[0][allowed].argmax()] == token


def test_a_constraint_that_allows_nothing_fails_its_request_alone():
    tokens, _, failed = sample(rows(2), [constrained(0, 60), constrained(1, 3)])
    assert ["1"] == list(tokens)
    assert "no token can be sampled: nothing may follow" == failed["0"]


def test_stop_ids_wait_for_the_least_number_of_tokens_unless_nothing_else_is_allowed():
    logits = np.zeros((1, 50), np.float32)
    logits[0, 48] = 9.0
    early = constrained(0, 10, temperature=0.0, min_tokens=20, stop_ids=frozenset({48}))
    assert (48,) != sample(logits, [early])[0]["0"]
    last = constrained(0, 47, temperature=0.0, min_tokens=60, stop_ids=frozenset({48}))
    assert (48,) == sample(logits, [last])[0]["0"]


def test_an_executor_begins_the_search_for_what_samples_only():
    works = [constrained(0, 4), constrained(1, 5)._replace(samples=False), work(2, None)]
    begin_constraints(works)
    assert ([4], []) == (works[0].sampling.constraint.begun, works[1].sampling.constraint.begun)


@pytest.mark.parametrize("position", [5, 60])
def test_a_mask_goes_over_the_wire_for_one_position(position):
    own = constrained(0, position, temperature=0.0)
    theirs = own._replace(sampling=of_values(to_values(own.sampling, own.output), len(own.output)))
    assert sample(rows(1), [own]) == sample(rows(1), [theirs])


def test_values_that_are_no_mask_are_refused():
    with pytest.raises(ValueError, match="not a sampling|hexadecimal"):
        of_values(to_values(Sampling()) | {"allowed": [["zz", ""]]})


def test_the_device_samples_as_the_host_does():
    torch = pytest.importorskip("torch")
    from stallfree.executors.torch.sampler import sample as on_device

    logits = rows(60)
    works = [
        constrained(row, row, temperature=(0.0, 0.8)[row % 2]) if row % 3 else work(row, Sampling(seed=row), row)
        for row in range(60)
    ]
    assert sample(logits, works) == on_device(torch.from_numpy(logits), works)


def test_a_plan_goes_over_the_wire_with_its_masks_and_scores():
    pytest.importorskip("torch")
    pytest.importorskip("msgpack")
    from stallfree.executors.torch import wire

    scored = work("s", Sampling(prompt_logprobs=2))._replace(
        start=0, count=2, tokens=(1, 2), samples=False, decode=False, prompt=(1, 2, 3, 4)
    )
    plan = wire.to_plan(wire.of_plan(Plan(0, 0.0, (constrained(0, 5, temperature=0.0), scored))))
    logits = rows(3)
    assert Rows([constrained(0, 5), scored]).rows == Rows(plan.work).rows == [0, 1, 2]
    assert Rows([scored]).scores(logits[1:]) == Rows(plan.work).scores(logits)
    assert sample(logits[:1], [constrained(0, 5, temperature=0.0)]) == sample(logits[:1], [plan.work[0]])


def test_scores_are_those_of_the_tokens_that_follow():
    scored = work("s", Sampling(prompt_logprobs=1))._replace(start=1, count=3, tokens=(2, 3, 4), decode=False, prompt=(1, 2, 3, 4))
    rows_wanted = Rows([work("d", None), scored])
    assert ([0, 1, 2, 3], [0, 3]) == (rows_wanted.rows, rows_wanted.sampled)
    logits = rows(4)
    ((start, scores),) = rows_wanted.scores(logits).values()
    assert (2, 2) == (start, len(scores))
    row = logits[1].astype(np.float64)
    assert row[3] - np.log(np.exp(row).sum()) == pytest.approx(scores[0].logprob, abs=1e-5)
    assert (1 + int((row > row[3]).sum()), int(row.argmax())) == (scores[0].rank, scores[0].top[0][0])


def test_rows_whose_search_goes_on_are_left_out():
    works = [work(0, None), constrained(1, 3), work(2, Sampling(constraint=Even(slow=True)), 3), work(3, Sampling())]
    assert ([0, 1, 3], {"2"}) == ready_rows(works)
