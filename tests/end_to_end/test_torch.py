"""The embedded model on torch, in one process and in several: greedy tokens equal those of the default executor."""

import pytest

from stallfree.engine.assemble import Options, assemble
from tests.end_to_end.test_embedded import outputs

pytest.importorskip("torch")

EXACT = {"weights": "f32", "kv": "f32", "kv_memory": 256 << 20, "max_model_len": 512}


@pytest.fixture(scope="module")
def expected():
    engine = assemble(Options(**EXACT)).engine
    try:
        return outputs(engine, budget=64)[0]
    finally:
        engine.close()


SLOW = [pytest.param(*shape, marks=pytest.mark.slow) for shape in ((3, 1, 1), (3, 1, 2), (1, 4, 1))]


@pytest.mark.parametrize(("tp", "sp", "pp"), [(1, 1, 1), (1, 1, 2), (1, 2, 1), *SLOW])
def test_greedy_tokens_are_the_same_on_any_ranks(expected, tp, sp, pp):  # two ranks do not divide its 9 heads
    engine = assemble(Options(executor="torch", device="cpu", tp=tp, sp=sp, pp=pp, **EXACT)).engine
    try:
        assert expected == outputs(engine, budget=64)[0]
    finally:
        engine.close()
