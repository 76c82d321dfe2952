"""Which deployments are candidates, and which are refused."""

import pytest

from stallfree.planner.candidates import WAYS, Candidates, name, size
from stallfree.planner.site import Site
from stallfree.sim.pairings import PAIRINGS


def test_a_model_is_split_over_as_many_devices_as_it_needs_and_no_more_nodes():
    assert [(1, 1), (2, 1), (4, 1)] == list(Candidates(Site("llama2-7b", gpus=8, nodes=2)).shapes)
    assert [(2, 1), (4, 1)] == list(Candidates(Site("llama2-70b", gpus=16, nodes=4)).shapes)
    assert [(4, 2)] == list(Candidates(Site("falcon-180b", gpus=16, nodes=4)).shapes)


def test_ratios_have_no_common_divisor_and_fit():
    ratios = list(Candidates(Site("llama2-7b", gpus=4, nodes=1)).ratios((1, 1), (2, 1)))
    assert [(1, 1), (2, 1)] == ratios
    assert (2, 2) not in list(Candidates(Site("llama2-7b", gpus=8)).ratios((1, 1), (1, 1)))


@pytest.mark.parametrize("way", WAYS)
def test_a_unit_is_on_as_few_nodes_as_hold_it(way):
    candidates = Candidates(Site("llama2-7b", gpus=8, nodes=4))
    assert [1, 2] == [candidates.split(way, (1, 1), (1, 1), numbers).nodes for numbers in ((1, 1), (1, 2))]
    assert 4 == candidates.split(way, (1, 1), (1, 1), (1, 1), whole=True).nodes
    assert 3 == size(candidates.split(way, (1, 1), (1, 1), (1, 2)))
    assert way in PAIRINGS


def test_names():
    candidates = Candidates(Site("llama2-7b", gpus=8))
    assert "distserve 2 x TP1 -> 1 x TP4" == name(candidates.split("distserve", (1, 1), (4, 1), (2, 1)))
    assert "splitwise 1 x TP1 -> 1 x TP1, KV anywhere" == name(candidates.split("splitwise", (1, 1), (1, 1), (1, 1), whole=True))
    assert "sarathi:512 TP2" == name(candidates.replica(2, 1, "sarathi", 512))


def test_a_prefill_batch_of_distserve_saturates():
    candidates = Candidates(Site("llama2-7b", gpus=2))
    cost, most = candidates.shapes[1, 1].cost, candidates.saturation(1, 1)
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
