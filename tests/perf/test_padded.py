"""The price of padding."""

import pytest

from stallfree.perf.fitted import Fitted
from stallfree.perf.padded import Padded

PRICES = (0.01, 0.05, 0.0, 0.0, 0.0, 0.0)
"""10 ms an iteration and 0.5 ms a token, nothing else."""


@pytest.fixture
def padded() -> Padded:
    return Padded(Fitted(PRICES), [1, 2, 4, 8, 16, 32, 64])


@pytest.mark.parametrize(("tokens", "paid"), [(1, 1), (3, 4), (8, 8), (9, 16), (64, 64), (65, 65), (100, 100)])
def test_an_iteration_costs_what_the_next_size_costs(padded, tokens, paid):
    assert padded.seconds([(0, tokens)]) == pytest.approx(0.01 + 0.0005 * paid)
    assert padded.seconds([(5, 1)] * tokens) == pytest.approx(0.01 + 0.0005 * paid)


@pytest.mark.parametrize("decodes", [0, 1, 3, 20, 63, 64, 70])
@pytest.mark.parametrize("most", [1, 2, 5, 30, 500])
@pytest.mark.parametrize("limit", [0.001, 0.0111, 0.014, 0.02, 0.03, 0.042, 0.05, 0.3])
def test_the_room_is_the_most_that_is_in_time(padded, decodes, most, limit):
    shape = [(5, 1)] * decodes
    best = max((count for count in range(1, most + 1) if padded.seconds([*shape, (7, count)]) <= limit + 1e-12), default=0)
    assert padded.room(shape, 7, most, limit) == pytest.approx(best, abs=1)


def test_it_learns_through_the_padding(padded):
    for _ in range(200):
        padded.learn([(0, 9)], 2 * (0.01 + 0.0005 * 16))
    assert padded.seconds([(0, 9)]) == pytest.approx(2 * (0.01 + 0.0005 * 16), rel=0.02)


def test_sizes_are_numbers_of_tokens():
    with pytest.raises(ValueError, match=r"each at least 1; these are \[\]"):
        Padded(Fitted(PRICES), [])
    with pytest.raises(ValueError, match=r"these are \[0, 4\]"):
        Padded(Fitted(PRICES), [4, 0])
