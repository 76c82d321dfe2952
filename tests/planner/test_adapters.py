"""A site with adapters: every deployment has them, and the answer says what is assumed about them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from stallfree.core.slo import Slo
from stallfree.planner.candidates import Candidates, Shape
from stallfree.planner.known import known
from stallfree.planner.site import Site
from stallfree.sim.simulator import Simulator
from stallfree.sim.split import SplitSimulator
from stallfree.sim.trials import Trials
from stallfree.workload.traffic import Traffic

SITE = Site("llama2-7b", gpus=2, rank="8,16", adapter_modules="all", max_model_len=4096)
SLO = Slo.parse("ttft=2s@p90,tbt=100ms@p99")
LOAD = Traffic(lengths="512/16", requests=32, adapters=20)


def test_every_deployment_has_the_sites_adapters():
    candidates = Candidates(SITE)
    pair = candidates.split("distserve", Shape(1), Shape(1), (1, 1))
    for deployment in (candidates.replica(Shape(1), "slo", slo=str(SLO)), pair.prefill, pair.decode):
        assert ("8,16", "all") == (deployment.rank, deployment.adapter_modules)
    for simulator in (Simulator(candidates.replica(Shape(2))), SplitSimulator(pair)):
        assert 32 == simulator.trial(LOAD, 1.0, 0, SLO).completed


def test_a_site_without_adapters_has_none():
    assert Candidates(Site("llama2-7b", gpus=1)).replica(Shape(1)).rank is None


def test_a_rank_that_is_none_is_named():
    with pytest.raises(ValueError, match="--rank '0' is no list of ranks"):
        Candidates(Site("llama2-7b", gpus=1, rank="0"))


def test_what_is_assumed_about_adapters_is_said():
    answer = SimpleNamespace(ranked=[], best=SimpleNamespace(draws=(1.0,)))
    assert "PCIe 4.0 from the host's memory" in known(SITE, answer, LOAD)["adapters, assumed"]
    assert "adapters, assumed" not in known(replace(SITE, rank=None), answer, LOAD)


@pytest.mark.parametrize("kind", ["co-located", "two pools"])
def test_simulators_with_adapters_travel_to_other_processes(kind):
    candidates = Candidates(SITE)
    pair = candidates.split("splitwise", Shape(1), Shape(1), (1, 1))
    simulator = Simulator(candidates.replica(Shape(1))) if kind == "co-located" else SplitSimulator(pair)
    with Trials({kind: simulator}) as trials:
        there = trials.reports({"one": (kind, LOAD, 3.0, 0, SLO)})["one"]
    assert simulator.trial(LOAD, 3.0, 0, SLO) == there
