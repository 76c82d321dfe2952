"""Any two features together, and some three, give the tokens of an engine that has none of them, or are refused by name."""

import random
from itertools import combinations

import pytest

pytest.importorskip("torch")

from tests.composition.page import PAGE, page
from tests.composition.serving import FEATURES, REFUSED, World

PAIRS = list(combinations(FEATURES, 2))
UNSURE = ({"overlap", "preemption"}, {"host tier", "restart"}, {"host tier", "hand-off"})
"""With overlap, KV has to be short at the right moment for a preemption, and what comes back from host memory has to have been
computed since the restart, or by this engine; not so with every third feature."""
TRIPLES = random.Random(2).sample(
    [three for three in combinations(FEATURES, 3) if not any(pair <= set(three) for pair in [*REFUSED, *UNSURE])],
    60,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("composition"))
    yield world
    world.close()


@pytest.mark.parametrize("features", [(name,) for name in FEATURES], ids=" ".join)
def test_each_feature_alone(world, features):
    world.serve(features)


@pytest.mark.parametrize(
    "features", [pytest.param(pair, marks=pytest.mark.slow) if "SP2" in pair else pair for pair in PAIRS], ids=" + ".join
)
def test_two_features(world, features):
    if frozenset(features) in REFUSED:
        words = "without overlap|kv 'u[84]' is unknown|KV has one format|few tokens take another|--speculate 'ngram, draft:model'"
        words += "|policy elastic|number of instances|Cluster has no KV that can be transferred"
        with pytest.raises(ValueError, match=words):
            world.serve(features)
    else:
        world.serve(features)


@pytest.mark.slow
@pytest.mark.parametrize("features", TRIPLES, ids=" + ".join)
def test_three_features(world, features):
    world.serve(features)


def test_the_page_says_what_is_tested():
    assert page() == PAGE.read_text(), "run `python -m tests.composition`"
