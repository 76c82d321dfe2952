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


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (1, 2), *(pytest.param(3, pp, marks=pytest.mark.slow) for pp in (1, 2))])
def test_greedy_tokens_are_the_same_on_any_ranks(expected, tp, pp):  # two ranks do not divide its 9 heads
    engine = assemble(Options(executor="torch", device="cpu", tp=tp, pp=pp, **EXACT)).engine
    try:
        assert expected == outputs(engine, budget=64)[0]
    finally:
        engine.close()
