"""What a request adds is priced in an iteration that runs anyway, also where few tokens would take another, quicker way."""

import pytest

from stallfree.perf.fitted import Fitted
from stallfree.qos import prices

LINEAR = (0.009, 0.05, 0.02, 0.03, 0.02, 0.004, 0.02, 0.005)


@pytest.mark.parametrize("few", [1, 2, 4])
def test_what_a_request_adds_does_not_depend_on_the_way_of_few_tokens(few):
    plain, apart = Fitted(LINEAR), Fitted((*LINEAR, 0.0, 0.006, 0.003), few=few)
    for start, stop in ((0, 1), (0, 2), (0, 5), (300, 303), (300, 1300)):
        assert prices.prefill(apart, start, stop) == pytest.approx(prices.prefill(plain, start, stop))
    for extra in (0, 20):
        assert prices.decode(apart, 700, extra) == pytest.approx(prices.decode(plain, 700, extra))
    # Ranks cost with each token of the base, so a base of one token and a larger one differ.
    beside = [(0, few)]
    wanted = plain.seconds([(64, -1), *beside, (1, 1)]) - plain.seconds([*beside, (1, 1)])
    assert prices.adapters(apart, [(64, -1)]) == pytest.approx(wanted)
    assert prices.adapters(apart, []) == 0


def test_a_lone_decode_is_quicker_than_what_it_adds_suggests():
    apart = Fitted((*LINEAR, 0.0, 0.006, 0.0), few=4)
    assert apart.seconds([(0, 1)]) < apart.seconds([(0, 1)] * 5) - 4 * prices.decode(apart, 0)
