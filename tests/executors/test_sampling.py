"""Sampling does what its parameters say, and depends on the request's seed and position alone."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from stallfree.core.plan import Work
from stallfree.core.uniform import uniform
from stallfree.executors.sampling import Sampling, TokenLogprob, _largest, _nucleus, sample

VOCAB = 1000


def work(
    sampling: Sampling | None, *, id: str = "a", start: int = 3, prompt: tuple[int, ...] = (1, 2, 3), output: tuple[int, ...] = (4,)
) -> Work:
    return Work(id, start, 1, True, True, (0,), (0,), sampling, "", prompt, output)


def token_of(row: np.ndarray, sampling: Sampling | None, **kwargs: object) -> int:
    tokens, _, failed = sample(row[None].astype(np.float32), [work(sampling, **kwargs)])
    assert failed == {}
    return tokens["a"][0]


def drawn(row: np.ndarray, sampling: Sampling, count: int = 2000) -> Counter[int]:
    """Tokens drawn under `count` seeds."""
    return Counter(token_of(row, replace(sampling, seed=seed)) for seed in range(count))


@pytest.fixture
def row() -> np.ndarray:
    return np.random.default_rng(0).normal(size=VOCAB).astype(np.float32)


def test_no_sampling_is_greedy(row: np.ndarray) -> None:
    assert row.argmax() == token_of(row, None)


def test_temperature_zero_is_greedy(row: np.ndarray) -> None:
    assert row.argmax() == token_of(row, Sampling(temperature=0.0))


def test_a_tiny_temperature_is_greedy_and_does_not_overflow(row: np.ndarray) -> None:
    assert row.argmax() == token_of(row * 100, Sampling(temperature=1e-30))


def test_top_k_of_one_is_greedy(row: np.ndarray) -> None:
    assert {int(row.argmax())} == set(drawn(row, Sampling(temperature=5.0, top_k=1), 50))


@pytest.mark.parametrize("k", [2, 7, 100, 999])
def test_top_k_draws_from_the_k_largest_only(row: np.ndarray, k: int) -> None:
    assert set(np.argsort(-row)[:k]) >= set(drawn(row, Sampling(temperature=50.0, top_k=k), 300))


def test_top_p_draws_from_the_smallest_set_that_holds_p() -> None:
    row = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    assert {0, 1, 2} == set(drawn(row, Sampling(top_p=0.9)))


def test_top_p_keeps_at_least_one_token() -> None:
    assert {0} == set(drawn(np.log(np.array([0.5, 0.3, 0.2])), Sampling(top_p=1e-9), 50))


def test_min_p_draws_only_what_is_likely_beside_the_likeliest() -> None:
    row = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    assert {0, 1} == set(drawn(row, Sampling(min_p=0.5)))


def test_filters_combine() -> None:
    row = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05]))
    assert {0, 1} == set(drawn(row, Sampling(top_k=4, top_p=0.7, min_p=0.2)))


def test_frequencies_follow_the_distribution() -> None:
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    counts = drawn(np.log(probabilities), Sampling(), 4000)
    np.testing.assert_allclose([counts[t] / 4000 for t in range(4)], probabilities, atol=0.025)


def test_temperature_sharpens_the_distribution() -> None:
    probabilities = np.array([0.5, 0.3, 0.2])
    counts = drawn(np.log(probabilities), Sampling(temperature=0.5), 4000)
    np.testing.assert_allclose([counts[t] / 4000 for t in range(3)], probabilities**2 / sum(probabilities**2), atol=0.025)


def test_the_same_seed_and_position_give_the_same_token_alone_and_batched(row: np.ndarray) -> None:
    rows = np.stack([row, row[::-1], row * 2])
    works = [work(Sampling(seed=s), id=str(s)) for s in range(3)]
    together, _, _ = sample(rows, works)
    alone = {w.id: sample(r[None], [w])[0][w.id] for r, w in zip(rows, works, strict=True)}
    assert alone == together


def test_a_chunk_and_a_decode_that_end_at_the_same_position_draw_the_same_token(row: np.ndarray) -> None:
    decode = work(Sampling(seed=9), start=7)
    chunk = decode._replace(start=2, count=6)
    assert sample(row[None], [decode])[0] == sample(row[None], [chunk])[0]


def test_positions_draw_independently(row: np.ndarray) -> None:
    assert len({token_of(row, Sampling(seed=1), start=start) for start in range(50)}) > 20


def test_uniform_numbers_are_uniform() -> None:
    numbers = np.array([uniform(seed, position) for seed in range(100) for position in range(100)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    np.testing.assert_allclose(np.histogram(numbers, 10, (0, 1))[0], 1000, atol=130)


def test_a_negative_or_huge_seed_is_as_good_as_any(row: np.ndarray) -> None:
    assert 0 <= token_of(row, Sampling(seed=-(2**100))) < VOCAB


def test_logit_bias_is_added() -> None:
    assert 2 == token_of(np.zeros(4), Sampling(temperature=0, logit_bias={2: 1.0, 3: -1.0}))


def test_repetition_penalty_divides_positive_logits_of_prompt_and_output_and_multiplies_negative_ones() -> None:
    penalised = Sampling(temperature=0, repetition_penalty=2.0)
    assert 3 == token_of(np.array([5.0, 4.0, 4.0, 3.0]), penalised, prompt=(0, 1), output=(2,), start=2)
    assert 1 == token_of(np.array([-1.0, -1.5]), penalised, prompt=(0,), output=(), start=0)


def test_presence_penalty_is_subtracted_once_from_tokens_of_the_output() -> None:
    assert 1 == token_of(np.array([2.0, 1.5]), Sampling(temperature=0, presence_penalty=0.6), prompt=(1,), output=(0, 0), start=2)
    assert 0 == token_of(np.array([2.0, 1.0]), Sampling(temperature=0, presence_penalty=0.6), prompt=(1,), output=(0, 0), start=2)


def test_frequency_penalty_is_subtracted_for_each_occurrence_in_the_output() -> None:
    assert 1 == token_of(np.array([2.0, 1.0]), Sampling(temperature=0, frequency_penalty=0.6), prompt=(1,), output=(0, 0), start=2)


def test_output_beyond_the_work_does_not_count() -> None:
    penalised = Sampling(temperature=0, presence_penalty=1.0)
    assert 0 == token_of(np.array([2.0, 1.5]), penalised, prompt=(1,), output=(1, 0), start=1)


def test_stop_tokens_are_masked_until_min_tokens_are_out() -> None:
    patient = Sampling(temperature=0, min_tokens=2, stop_ids=frozenset({0}))
    assert 1 == token_of(np.array([2.0, 1.0]), patient, prompt=(1,), output=(1,), start=1)
    assert 0 == token_of(np.array([2.0, 1.0]), patient, prompt=(1,), output=(1, 1), start=2)


def test_logprobs_are_of_the_models_own_distribution() -> None:
    row = np.log(np.array([0.5, 0.3, 0.2]))
    how = Sampling(temperature=0, logprobs=2, logit_bias={2: 9.0})
    _, details, _ = sample(row[None].astype(np.float32), [work(how)])
    (detail,) = details["a"]
    assert isinstance(detail, TokenLogprob)
    assert pytest.approx(np.log(0.2), abs=1e-5) == detail.logprob
    assert [(0, pytest.approx(np.log(0.5), abs=1e-5)), (1, pytest.approx(np.log(0.3), abs=1e-5))] == list(detail.top)


def test_logprobs_of_zero_alternatives_report_the_chosen_token_alone(row: np.ndarray) -> None:
    _, details, _ = sample(row[None], [work(Sampling(logprobs=0))])
    assert () == details["a"][0].top


@pytest.mark.parametrize("sampling", [None, Sampling(), Sampling(top_k=3, top_p=0.5)])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_fail_their_own_request_only(row: np.ndarray, sampling: Sampling | None, bad: float) -> None:
    broken = row.copy()
    broken[5] = bad
    tokens, _, failed = sample(np.stack([broken, row]), [work(sampling, id="a"), work(None, id="b")])
    assert {"b": (int(row.argmax()),)} == tokens
    assert ["a"] == list(failed)
    assert "not finite" in failed["a"]


def test_a_bias_that_forbids_everything_fails_the_request() -> None:
    _, _, failed = sample(np.zeros((1, 2), np.float32), [work(Sampling(logit_bias={0: -np.inf, 1: -np.inf}))])
    assert ["a"] == list(failed)


def test_the_logits_are_left_as_they_are(row: np.ndarray) -> None:
    before = row.copy()
    token_of(row, Sampling(temperature=0.7, top_p=0.9, top_k=50, repetition_penalty=1.5, logit_bias={1: 2.0}))
    np.testing.assert_array_equal(before, row)


def test_no_rows_give_no_tokens() -> None:
    assert ({}, {}, {}) == sample(np.zeros((0, VOCAB), np.float32), [])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [10, 5000, 49_152])
@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 8.0])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
def test_a_nucleus_is_the_fewest_largest_weights_that_hold_its_share(seed: int, size: int, spread: float, top_p: float) -> None:
    """For any number of candidates. Flat distributions are told apart by the leading bits of their weights."""
    row = np.random.default_rng(seed).normal(0, spread, size)
    weights = np.exp(row - row.max()).astype(np.float32)
    kept = _nucleus(weights, top_p)
    mass, wanted = np.float64(weights[kept].sum(dtype=np.float64)), top_p * weights.sum(dtype=np.float64)
    assert list(kept) == sorted(set(kept))
    assert mass >= wanted * (1 - 1e-9)
    assert mass - weights[kept].min() <= wanted * (1 + 1e-9)
    assert weights[kept].min() >= np.delete(weights, kept).max(initial=0)


@pytest.mark.parametrize("k", [1, 5, 64, 700, 2000, 4999])
def test_the_largest_are_those_of_a_whole_sort_and_among_equals_the_first(k: int) -> None:
    row = np.random.default_rng(3).integers(0, 50, 5000).astype(np.float32)
    assert sorted(np.argsort(-row, kind="stable")[:k]) == list(_largest(row, k))


def test_log_probabilities_of_many_rows_are_those_of_each_alone(row: np.ndarray) -> None:
    rows = np.stack([row, row * 3, row - 100])
    works = [work(Sampling(logprobs=5, seed=i), id=str(i)) for i in range(3)]
    _, together, _ = sample(rows, works)
    for r, w in zip(rows, works, strict=True):
        (alone,), (beside,) = sample(r[None], [w])[1][w.id], together[w.id]
        assert pytest.approx(alone.logprob) == beside.logprob
        assert [token for token, _ in alone.top] == [token for token, _ in beside.top]


def test_what_sampling_asks_for_counts_as_rows() -> None:
    assert 0 == Sampling().extra_rows == Sampling(temperature=0, top_p=0.5).extra_rows
    assert 0 == Sampling(temperature=0.2, top_p=0.9).extra_rows
    hows = [{"top_p": 0.9}, {"top_p": 0.9, "repetition_penalty": 1.1}, {"top_p": 0.9, "repetition_penalty": 1.1, "logprobs": 20}]
    rows = [Sampling(**how).extra_rows for how in hows]
    assert rows == sorted(set(rows))
    assert rows[0] > 0


@pytest.mark.parametrize("how", [{}, {"top_p": 0.9}, {"top_k": 20}, {"top_p": 0.95, "top_k": 5, "min_p": 0.01}])
def test_at_a_low_temperature_tokens_without_weight_are_left_away_and_nothing_else(row: np.ndarray, how: dict[str, float]) -> None:
    cold = Sampling(temperature=0.2, **how)
    hot = Sampling(temperature=1.0, **how)  # logits five times as large give the same weights
    assert drawn(row, cold, 300) == drawn(row * 5, hot, 300)


def drafted(sampling: Sampling | None, *drafts: int, id: str = "a", output: tuple[int, ...] = (4,)) -> Work:
    """A decode of the last of `output` with drafts after it."""
    tokens = (output[-1], *drafts)
    return Work(id, 3 + len(output) - 1, len(tokens), True, True, tokens, (0,), sampling, "", (1, 2, 3), output)


def test_with_drafts_each_position_samples_what_it_would_alone_up_to_the_first_wrong_one() -> None:
    rows = np.random.default_rng(4).normal(size=(6, 50)).astype(np.float32)
    how = Sampling(seed=3, frequency_penalty=1.0, logprobs=1)
    alone: list[int] = []
    for place in range(5):
        (token,) = sample(rows[place][None], [work(how, start=3 + place, output=(4, *alone))])[0]["a"]
        alone.append(token)
    for right in range(5):
        guesses = [*alone[:right], *[(token + 1) % 50 for token in alone[right:4]]]
        tokens, details, failed = sample(rows, [drafted(how, *guesses), work(None, id="b")])
        assert (tuple(alone[: right + 1]), {}) == (tokens["a"], failed)
        assert right + 1 == len(details["a"])
        assert (int(rows[5].argmax()),) == tokens["b"], "its row comes after those of the drafts"


def test_tokens_with_drafts_have_the_models_own_distribution() -> None:
    """Chi-square over a vocabulary of 8, whatever was guessed."""
    rows = np.random.default_rng(5).normal(size=(2, 8)).astype(np.float32)
    expected = np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True)
    number = 4000
    for guess in range(8):
        first, second = np.zeros(8), np.zeros(8)
        for seed in range(number):
            tokens = sample(rows, [drafted(Sampling(seed=number * guess + seed), guess)])[0]["a"]
            first[tokens[0]] += 1
            if len(tokens) > 1:
                assert tokens[0] == guess
                second[tokens[1]] += 1
        assert ((first - number * expected[0]) ** 2 / (number * expected[0])).sum() < 24.3  # 1 in 1,000
        assert ((second - second.sum() * expected[1]) ** 2 / (second.sum() * expected[1])).sum() < 24.3
        assert first[guess] == second.sum(), "a guess counts as often as the model would have said it"


def test_what_fails_at_a_draft_ends_what_the_request_gets_and_at_its_own_token_the_request() -> None:
    rows = np.zeros((3, 9), np.float32)
    rows[:, 5] = 1.0
    rows[1] = np.nan
    tokens, _, failed = sample(rows, [drafted(None, 5, 5)])
    assert ((5,), {}) == (tokens["a"], failed)
    tokens, _, failed = sample(rows[1:], [drafted(None, 5)])
    assert {} == tokens
    assert "not finite" in failed["a"]
