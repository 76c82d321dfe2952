"""Which deployments are candidates, and which are refused."""

from dataclasses import replace

import pytest

from stallfree.planner.candidates import WAYS, Candidates, Shape, name, size
from stallfree.planner.site import Site
from stallfree.sim.pairings import PAIRINGS
from stallfree.sim.split import place
from stallfree.sim.systems import saturation


def splits(model, gpus, nodes):
    """TP and PP of the shapes that are no rings."""
    return {(tp, pp) for tp, pp, sp in Candidates(Site(model, gpus=gpus, nodes=nodes)).shapes if sp == 1}


def test_a_ring_is_in_one_node_and_has_prices():
    site = Site("llama2-7b", gpus=8, nodes=2)
    assert {(1, 1, 2), (1, 1, 4), (2, 1, 2)} == {shape for shape in Candidates(site).shapes if shape.sp > 1}
    assert not [shape for shape in Candidates(replace(site, rank="16")).shapes if shape.sp > 1]
    assert "slo TP2-SP2" == name(Candidates(site).replica(Shape(2, 1, 2), "slo"))


def test_a_model_is_split_by_heads_and_by_layers_within_a_node_and_by_layers_over_nodes():
    assert {(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4), (4, 2)} == splits("llama2-7b", 8, 2)
    assert {(2, 1), (4, 1), (1, 2), (2, 2)} < splits("llama2-70b", 16, 4)
    assert {(4, 2), (2, 4), (4, 4)} == splits("falcon-180b", 16, 4)


def test_a_replica_larger_than_a_node_has_a_stage_in_each_node():
    candidates = Candidates(Site("opt-175b", gpus=24, nodes=3))
    assert 8 == candidates.replica(Shape(8)).node
    assert 3 == candidates.replica(Shape(3, 3)).node
    assert 2 == candidates.most(candidates.replica(Shape(4, 3)))


def test_the_placements_that_distserve_published_are_candidates():
    """arXiv 2401.09670, table of the parallelism strategies: OPT-66B and OPT-175B."""
    medium = Candidates(Site("opt-66b", gpus=32, nodes=4))
    assert {Shape(4), Shape(2, 2)} < set(medium.shapes)
    assert 1 == medium.split("distserve", Shape(4), Shape(2, 2), (1, 1)).nodes
    large = Candidates(Site("opt-175b", gpus=32, nodes=4))
    assert {Shape(3, 3), Shape(4, 3)} < set(large.shapes)
    pair = large.split("distserve", Shape(3, 3), Shape(4, 3), (1, 1))
    assert (3, 1) == (pair.nodes, large.most(pair))
    assert place(pair)[0] == place(pair)[1]


def test_ratios_have_no_common_divisor_and_fit():
    ratios = list(Candidates(Site("llama2-7b", gpus=4, nodes=1)).ratios(Shape(1), Shape(2)))
    assert [(1, 1), (2, 1)] == ratios
    assert (2, 2) not in list(Candidates(Site("llama2-7b", gpus=8)).ratios(Shape(1), Shape(1)))


@pytest.mark.parametrize("way", WAYS)
def test_a_unit_is_on_as_few_nodes_as_hold_it(way):
    candidates = Candidates(Site("llama2-7b", gpus=8, nodes=4))
    assert [1, 2] == [candidates.split(way, Shape(1), Shape(1), numbers).nodes for numbers in ((1, 1), (1, 2))]
    assert 4 == candidates.split(way, Shape(1), Shape(1), (1, 1), whole=True).nodes
    assert 3 == size(candidates.split(way, Shape(1), Shape(1), (1, 2)))
    assert way in PAIRINGS


def test_names():
    candidates = Candidates(Site("llama2-7b", gpus=8))
    assert "distserve 2 x TP1 -> 1 x TP4" == name(candidates.split("distserve", Shape(1), Shape(4), (2, 1)))
    assert "splitwise 1 x TP1 -> 1 x TP1, KV anywhere" == name(
        candidates.split("splitwise", Shape(1), Shape(1), (1, 1), whole=True)
    )
    assert "sarathi:512 TP2" == name(candidates.replica(Shape(2), "sarathi", 512))


def test_a_prefill_batch_of_distserve_saturates():
    candidates = Candidates(Site("llama2-7b", gpus=2))
    cost, most = candidates.shapes[Shape(1)].cost, saturation(candidates.shapes[Shape(1)].cost)
    assert cost.seconds([(0, most)]) / most < 1.1 * cost.seconds([(0, 4096)]) / 4096
    assert cost.seconds([(0, most // 2)]) / (most // 2) > 1.05 * cost.seconds([(0, most)]) / most


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gpus": 6, "nodes": 4}, "6 GPUs are not evenly on 4 nodes"),
        ({"gpus": 0}, "0 GPUs are too few"),
        ({"gpus": 32, "nodes": 2}, "16 GPUs in a node are more than the 8"),
        ({"link": "ib-201g"}, "did you mean 'ib-200g'"),
        ({"hardware": "a100"}, "unknown hardware 'a100'"),
    ],
)
def test_what_cannot_be_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        Candidates(Site(**({"model": "llama2-7b"} | changes)))


def test_a_model_that_fits_nowhere_is_refused_with_what_it_lacks():
    with pytest.raises(ValueError, match="no split of 2 GPUs holds the model: falcon-180b .* too much"):
        Candidates(Site("falcon-180b", gpus=2))
