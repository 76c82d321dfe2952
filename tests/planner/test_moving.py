"""Which deployments of cut and moved requests a plan tries."""

from dataclasses import replace

import pytest

from stallfree.planner import moving
from stallfree.planner.candidates import Candidates, Shape, kind, name
from stallfree.planner.site import Site
from stallfree.sim.split import SplitSimulator

SITE = Site("llama2-7b", gpus=8, max_model_len=4096)
SLO = "ttft=1s@p90,tbt=50ms@p99"


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
    }
    for unit, _ in moving.units(candidates, alone, SLO):
        assert kind(unit) == "moving"
        SplitSimulator(unit)


def test_one_device_has_nowhere_to_move_to():
    assert not list(moving.units(Candidates(replace(SITE, gpus=1)), {Shape(1): 3.0}, SLO))


def test_adapters_do_not_move():
    assert not list(moving.units(Candidates(replace(SITE, rank="16", adapter_modules="all")), {Shape(1): 3.0}, SLO))


def test_every_other_chunk_size_is_tried_for_one_kind_at_a_time(candidates):
    unit = candidates.moving("taichi", ((Shape(1), 1), (Shape(1), 3)), moving.CHUNKS["taichi"], SLO)
    first, second = ([name(each).split(", ")[1] for each in moving.other_chunks(unit, second)] for second in (False, True))
    assert first == ["512/256", "2048/256", "slo/256"]
    assert second == ["1024/512", "1024/1024", "1024/slo"]
    for each in moving.other_chunks(unit, False):
        SplitSimulator(each)
