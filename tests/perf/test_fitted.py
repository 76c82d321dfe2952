"""The fitted model finds the prices behind iterations, follows a machine that changes speed, and knows how much fits."""

import random

import pytest

from stallfree.perf.fitted import FEATURES, Fitted

PRICES = (0.009, 0.05, 0.02, 0.03, 0.02, 0.004)


def shapes(count: int, seed: int = 0) -> list[list[tuple[int, int]]]:
    rng = random.Random(seed)
    return [
        [(rng.randint(1, 2000), 1)] * rng.randint(0, 30) + [(rng.choice([0, 700, 1500]), rng.randint(2, 300))] * rng.randint(0, 2)
        for _ in range(count)
    ]


def samples(count: int = 80, factor: float = 1.0) -> list[tuple[list[tuple[int, int]], float]]:
    true = Fitted(PRICES)
    return [(shape, factor * true.seconds(shape)) for shape in shapes(count) if shape]


def test_a_batch_costs_what_its_shape_does_to_the_last_bit():
    model = Fitted(PRICES)
    for shape in filter(None, shapes(200)):
        decodes = [start for start, count in shape if count == 1]
        chunks = [piece for piece in shape if piece[1] > 1]
        assert model.seconds(shape) == model.batch(len(decodes), sum(decodes), chunks)


def test_prices_are_found_again():
    assert PRICES == pytest.approx(Fitted.fit(samples()).prices[:6], rel=0.02)


def test_what_adapters_cost_is_learned_from_the_iterations_that_have_them():
    true, model = Fitted((*PRICES, 0.02, 0.005)), Fitted.fit(samples())
    loads = [[(ranks, -1), *shape] for shape, ranks in zip(shapes(80, seed=3), (8, 64, 200, 400) * 20, strict=True) if shape]
    for shape in loads:
        model.learn(shape, true.seconds(shape))
    assert model.errors([(shape, true.seconds(shape)) for shape in loads]).median < 0.1
    assert model.errors(samples()).median < 0.1


def test_one_slow_iteration_does_not_make_adapters_dear():
    model = Fitted.fit(samples())
    shape = [(64, -1), *[(300, 1)] * 8]
    before = model.seconds(shape)
    model.learn(shape, 3 * before)
    assert model.seconds(shape) < 1.7 * before


def test_room_leaves_time_for_the_adapters_of_the_iteration():
    model, decodes = Fitted((*PRICES, 0.02, 0.005)), [(300, 1)] * 5
    count = model.room([(200, -1), *decodes], 0, 4000, 0.3)
    assert 1 < count < model.room(decodes, 0, 4000, 0.3)
    assert model.seconds([(200, -1), *decodes, (0, count)]) <= 0.3 < model.seconds([(200, -1), *decodes, (0, count + 1)])


def test_a_state_of_before_there_were_adapters_is_one():
    state = {"prices": list(PRICES), "quantum": 1, "anchor": [[1.0 * (i == j) for j in range(6)] for i in range(6)]}
    model = Fitted.from_state(state)
    assert list(PRICES) == model.prices[:6]
    assert model.state() == Fitted.from_state(model.state()).state()


def test_errors_are_those_of_the_worst_too():
    data = samples()
    data[7] = (data[7][0], 2 * data[7][1])
    errors = Fitted(PRICES).errors(data)
    assert 0 == pytest.approx(errors.median)
    assert 0.5 == pytest.approx(errors.largest)
    assert tuple(data[7][0]) == errors.worst
    assert [1, 2, 1] == pytest.approx(errors.scatter[6:9])


def test_no_price_is_negative_even_where_noise_would_have_it():
    rng = random.Random(1)
    noisy = [(shape, seconds * rng.uniform(0.5, 2)) for shape, seconds in samples(12)]
    assert all(price >= 0 for price in Fitted.fit(noisy).prices)


def test_a_change_of_speed_is_followed_within_tens_of_iterations():
    model = Fitted.fit(samples())
    for shape, seconds in samples(40, factor=2.0):
        model.learn(shape, seconds)
    assert model.errors(samples(factor=2.0)).median < 0.05


def test_what_traffic_never_shows_stays_as_calibrated():
    model = Fitted.fit(samples())
    for _ in range(2000):
        model.learn([(500, 1)] * 4, Fitted(PRICES).seconds([(500, 1)] * 4))
    assert model.errors(samples()).median < 0.02


@pytest.mark.parametrize("start", [0, 900])
@pytest.mark.parametrize("limit", [0.03, 0.08, 0.3])
def test_room_is_the_most_that_stays_within_the_limit(start: int, limit: float):
    model, decodes = Fitted(PRICES), [(300, 1)] * 5
    count = model.room(decodes, start, 4000, limit)
    if count > 1:
        assert model.seconds([*decodes, (start, count)]) <= limit
    assert model.seconds([*decodes, (start, count + 1)]) > limit or count == 4000


def test_room_keeps_to_whole_tiles_where_it_can():
    model, decodes = Fitted(PRICES, quantum=32), [(300, 1)] * 5
    assert 0 == (5 + model.room(decodes, 0, 4000, 0.1)) % 32
    assert 7 == model.room(decodes, 0, 7, 0.1)
    assert 0 < model.room(decodes, 0, 4000, 0.03) < 32


def test_a_model_begins_again_from_its_state():
    model = Fitted.fit(samples(), quantum=16)
    again = Fitted.from_state(model.state())
    assert (model.prices, 16) == (again.prices, again.quantum)


UNMET = 1 - 8 / 128
"""Of Qwen3-30B-A3B, whose tokens meet 8 of 128 experts."""


def mixture(count: int = 80) -> list[tuple[list[tuple[int, int]], float]]:
    """Iterations whose time is mostly that of the experts that they meet."""
    true = Fitted((*PRICES, 0.0, 0.0, 0.2), unmet=UNMET)
    few = [[(300, 1)] * number for number in (1, 2, 4, 8, 16)]
    return [(shape, true.seconds(shape)) for shape in [*few, *shapes(count)] if shape]


def test_the_experts_that_an_iteration_meets_are_priced():
    model = Fitted.fit(mixture(), unmet=UNMET)
    assert 0.2 == pytest.approx(model.prices[FEATURES.index("experts")], rel=0.05)
    assert model.errors(mixture()).p90 < 0.03 < Fitted.fit(mixture()).errors(mixture()).p90


def test_a_chunk_is_given_time_for_the_experts_that_it_meets():
    model, decodes = Fitted((*PRICES, 0.0, 0.0, 0.2), unmet=UNMET), [(300, 1)] * 3
    count = model.room(decodes, 0, 4000, 0.4)
    assert 1 < count
    assert model.seconds([*decodes, (0, count)]) <= 0.4 < model.seconds([*decodes, (0, count + 1)])
    assert 0 == model.room(decodes, 0, 4000, model.seconds(decodes) + 0.1)


def test_a_dense_model_costs_the_same_to_the_last_bit_whatever_experts_cost():
    plain, priced = Fitted(PRICES), Fitted((*PRICES, 0.0, 0.0, 0.2))
    assert all(plain.seconds(shape) == priced.seconds(shape) for shape in shapes(200))


def test_the_state_has_the_share_of_experts():
    model = Fitted.fit(mixture(), unmet=UNMET)
    again = Fitted.from_state(model.state())
    assert all(model.seconds(shape) == again.seconds(shape) for shape, _ in mixture())


@pytest.mark.parametrize("unmet", [-0.1, 1.0])
def test_a_share_of_experts_that_cannot_be_is_refused(unmet):
    with pytest.raises(ValueError, match="unmet is"):
        Fitted(PRICES, unmet=unmet)


@pytest.mark.parametrize(
    "state", [{}, {"prices": [1], "quantum": 1, "anchor": []}, {"prices": list(PRICES), "quantum": 1, "anchor": [[1]]}]
)
def test_what_is_no_state_is_refused(state: dict):
    with pytest.raises(ValueError, match="state of a cost model|prices are"):
        Fitted.from_state(state)


@pytest.mark.parametrize("prices", [(1.0,) * 3, (-0.1, *PRICES[1:]), (0.0,) * len(FEATURES), (float("nan"), *PRICES[1:])])
def test_prices_that_cannot_be_are_refused(prices: tuple):
    with pytest.raises(ValueError, match="prices are"):
        Fitted(prices)


def test_rows_that_sampling_counts_for_cost_what_a_row_costs():
    model = Fitted(PRICES)
    shape = [(100, 1)] * 3 + [(0, 50)]
    assert pytest.approx(model.seconds(shape) + 7 * PRICES[-1] / 10) == model.seconds([*shape, (7, 0)])
    assert model.room([*shape, (500, 0)], 0, 500, 0.2) < model.room(shape, 0, 500, 0.2)


FEW = Fitted((0.004, 0.03, 0.01, 0.01, 0.02, 0.002, 0, 0, 0, 0.005, 0.0008), few=4)
"""A machine on which up to four tokens take a quicker way."""


def test_few_tokens_are_priced_by_themselves():
    one, four, five = (FEW.seconds([(0, 1)] * count) for count in (1, 4, 5))
    assert four - one == pytest.approx(3 * (0.0008 + 0.0002))
    assert five == pytest.approx(0.004 + 0.005 + 5 * 0.0003 + 5 * 0.0002)
    assert FEW.seconds([(8, -1), (0, 1)]) > one + 0.0045  # adapters take the way of many


def test_the_prices_of_both_ways_are_found():
    data = [(shape, FEW.seconds(shape)) for shape in shapes(60) + [[(c, 1)] * n for n in (1, 2, 4) for c in (10, 900)] if shape]
    found = Fitted.fit(data, few=4)
    assert found.errors(data).largest < 0.02 < 0.05 < Fitted.fit(data).errors(data).p90
    assert Fitted.from_state(found.state()).seconds([(500, 1)]) == found.seconds([(500, 1)])


@pytest.mark.parametrize("decodes", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("most", [1, 2, 4, 700])
@pytest.mark.parametrize("limit", [0.004, 0.006, 0.011, 0.04])
@pytest.mark.parametrize("few", [4, 8, 60])
def test_a_chunk_may_leave_tokens_few_or_make_them_many(decodes, most, limit, few):
    cost = Fitted((0.004, 0.03, 0.01, 0.01, 0.02, 0.002, 0, 0, 0, 0.005, 0.0003), few=few)
    shape = [(100, 1)] * decodes
    count = cost.room(shape, 0, most, limit)
    assert 0 <= count <= most
    if count:
        assert cost.seconds([*shape, (0, count)]) <= limit
    assert count == most or cost.seconds([*shape, (0, count + 1)]) > limit


def test_a_number_of_few_tokens_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="few is -1"):
        Fitted(few=-1)
