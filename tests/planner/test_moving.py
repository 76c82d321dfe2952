"""Which deployments of cut and moved requests a plan tries."""

from dataclasses import replace

import pytest

from stallfree.core.slo import Slo
from stallfree.planner import moving
from stallfree.planner.candidates import Candidates, Shape, kind, name
from stallfree.planner.site import Site
from stallfree.sim.deployment import Split
from stallfree.sim.elastic import ElasticSimulator
from stallfree.sim.split import SplitSimulator

SITE = Site("llama2-7b", gpus=8, max_model_len=4096)
SLO = Slo.parse("ttft=1s@p90,tbt=50ms@p99")


@pytest.fixture(scope="module")
def candidates():
    return Candidates(SITE)


def test_the_best_split_is_tried_in_every_ratio_and_the_two_best_as_equal_instances(candidates):
    alone = {Shape(1): 3.0, Shape(2): 8.0, Shape(4): 9.0, Shape(2, 2): 99.0, Shape(1, 1, 4): 99.0}
    found = {name(unit): rate for unit, rate in moving.units(candidates, alone, SLO)}
    assert found == {
        "dynaserve 1 x TP2 -> 1 x TP2, slo/slo": 16.0,
        "taichi 1 x TP2 -> 1 x TP2, 1024/256": 16.0,
        "taichi 1 x TP2 -> 3 x TP2, 1024/256": 32.0,
        "taichi 3 x TP2 -> 1 x TP2, 1024/256": 32.0,
        "dynaserve 1 x TP1 -> 1 x TP1, slo/slo": 6.0,
        "elastic TP2-SP4": 32.0,
        "loongserve TP2-SP4": 32.0,
    }
    for unit, _ in moving.units(candidates, alone, SLO):
        assert kind(unit) == "moving"
        SplitSimulator(unit) if isinstance(unit, Split) else ElasticSimulator(unit)


def test_groups_are_of_the_best_split_of_which_a_node_has_several_and_repeat_by_node():
    candidates = Candidates(replace(SITE, gpus=16, nodes=4))
    units = [unit for unit, _ in moving.units(candidates, {Shape(4): 9.0, Shape(1): 1.0}, SLO) if not isinstance(unit, Split)]
    assert ["elastic TP1-SP4", "loongserve TP1-SP4"] == [name(unit) for unit in units]
    assert [4, 4] == [candidates.most(unit) for unit in units]
    ElasticSimulator(candidates.repeated(units[0], 4))


def test_without_a_target_between_tokens_there_are_no_stall_free_groups(candidates):
    units = moving.units(candidates, {Shape(1): 3.0}, Slo.parse("ttft=1s@p90,tpot=50ms@p99"))
    assert ["loongserve TP1-SP8"] == [name(unit) for unit, _ in units if not isinstance(unit, Split)]


def test_one_device_has_nowhere_to_move_to():
    assert not list(moving.units(Candidates(replace(SITE, gpus=1)), {Shape(1): 3.0}, SLO))


def test_adapters_do_not_move():
    assert not list(moving.units(Candidates(replace(SITE, rank="16", adapter_modules="all")), {Shape(1): 3.0}, SLO))


def test_every_other_chunk_size_is_tried_for_one_kind_at_a_time(candidates):
    unit = candidates.moving("taichi", ((Shape(1), 1), (Shape(1), 3)), moving.CHUNKS["taichi"], str(SLO))
    first, second = ([name(each).split(", ")[1] for each in moving.other_chunks(unit, second)] for second in (False, True))
    assert first == ["512/256", "2048/256", "slo/256"]
    assert second == ["1024/512", "1024/1024", "1024/slo"]
    for each in moving.other_chunks(unit, False):
        SplitSimulator(each)
