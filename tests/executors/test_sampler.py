"""Sampling on the device matches the host: the same tokens where the order is the same, elsewhere the same distribution."""

from collections import Counter

import numpy as np
import pytest

from stallfree.core.plan import Work
from stallfree.executors import sampling
from stallfree.executors.sampling import Sampling

torch = pytest.importorskip("torch")

from stallfree.executors.torch.sampler import Draw, sample  # noqa: E402


def work(row, how, position=0):
    return Work(str(row), position, 1, True, True, (0,), (0,), how, "", (1, 2), (3,))


def rows(number, size=50):
    return np.random.default_rng(7).normal(0, 2, (number, size)).astype(np.float32)


def test_greedy_and_plain_temperature_give_the_host_s_tokens():
    logits = rows(200)
    works = [work(i, Sampling(temperature=(0.0, 0.7, 1.3)[i % 3], seed=i), i) for i in range(200)]
    assert sampling.sample(logits, works) == sample(torch.from_numpy(logits), works)


@pytest.mark.parametrize(
    "how",
    [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 8, "top_p": 0.8, "min_p": 0.05}, {"temperature": 0.5, "top_p": 0.9}],
)
def test_what_is_cut_off_and_how_often_the_rest_comes_is_as_on_the_host(how):
    logits = np.repeat(rows(1, 12), 4000, 0)
    works = [work(i, Sampling(seed=i, **how)) for i in range(4000)]
    on_device, on_host = (
        Counter(token for (token,) in result[0].values())
        for result in (sample(torch.from_numpy(logits), works), sampling.sample(logits, works))
    )
    assert set(on_host) == set(on_device)
    assert all(abs(on_device[token] - on_host[token]) < 5 * max(on_host[token], 10) ** 0.5 for token in on_host)


def test_penalties_and_log_probabilities_are_the_host_s():
    logits = rows(4)
    hows = [Sampling(temperature=0, logit_bias={3: 9.0}), Sampling(temperature=0, logprobs=2), Sampling(temperature=0), None]
    works = [work(i, how) for i, how in enumerate(hows)]
    assert sampling.sample(logits, works) == sample(torch.from_numpy(logits), works)


def test_logits_that_are_not_finite_fail_their_own_request():
    logits = rows(3)
    logits[1, 4], logits[2] = np.nan, -np.inf
    works = [work(i, Sampling(temperature=i % 2, seed=1)) for i in range(3)]
    tokens, _, failed = sample(torch.from_numpy(logits), works)
    assert (["0"], ["1", "2"]) == (list(tokens), list(failed))
    assert "not finite" in failed["2"]
    assert [0, int(tokens["0"][0]), 0] == Draw(torch.from_numpy(logits), works).tokens(["1", "0", "2"]).tolist()


def test_a_token_does_not_depend_on_how_neighbours_are_sampled():
    logits = torch.from_numpy(rows(60))
    hows = [{}, {"top_k": 9}, {"min_p": 0.01}, {"temperature": 0}, {"top_p": 0.9}, {"logprobs": 1}]
    works = [work(i, Sampling(**{"seed": i} | hows[i % len(hows)])) for i in range(60)]
    alone = {w.id: sample(logits[i : i + 1], [w])[0][w.id] for i, w in enumerate(works)}
    assert alone == sample(logits, works)[0]


def test_nobody_may_sample():
    assert ({}, {}, {}) == sample(torch.empty(0, 50), [])
