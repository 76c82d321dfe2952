"""Published systems of two kinds of replicas, as policies of a deployment."""

from dataclasses import replace

import pytest

from stallfree.sim.deployment import Deployment
from stallfree.sim.movers import MOVERS
from stallfree.sim.pairings import PAIRINGS
from stallfree.sim.simulator import instance
from stallfree.sim.split import SplitSimulator
from stallfree.sim.systems import SYSTEMS, split
from stallfree.workload.workload import Arrival

FOUR = Deployment("llama2-7b", policy="distserve", replicas=4, max_model_len=4096, slo="ttft=1s,tbt=100ms")


def divided(deployment):
    return split(deployment, instance(deployment).cost)


def test_each_pairing_and_each_mover_is_a_system():
    assert set(SYSTEMS) == {*PAIRINGS, *MOVERS}


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_serves_with_its_kinds_of_replicas(system):
    pair = divided(replace(FOUR, policy=system, prefill_replicas=1))
    assert (pair.prefill.replicas, pair.decode.replicas, pair.pairing) == (1, 3, system)
    result = SplitSimulator(pair).run([Arrival(0.1 * number, 300, 20) for number in range(40)])
    assert [20] * 40 == [len(line.tokens) for line in result.lines]


def test_half_of_the_replicas_are_of_the_first_kind():
    pair = divided(FOUR)
    assert (pair.prefill.replicas, pair.decode.replicas) == (2, 2)


def test_replicas_that_do_not_fit_a_node_are_on_several():
    pair = divided(replace(FOUR, tp=4))
    assert (pair.nodes, pair.per_node) == (2, 8)
    SplitSimulator(pair)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"replicas": 1}, "give --replicas 2 or more"),
        ({"prefill_replicas": 4}, "4 of 4 replicas cannot be of the first kind; give 1 to 3"),
        ({"prefill_replicas": 0}, "0 of 4 replicas"),
        ({"token_budget": 512}, "has no token_budget, which is 512"),
        ({"router": "least-ttft"}, "has no router, which is least-ttft"),
    ],
)
def test_mistakes_are_named(changes, says):
    with pytest.raises(ValueError, match=says):
        divided(replace(FOUR, **changes))
