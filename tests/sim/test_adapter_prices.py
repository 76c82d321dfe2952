"""What adapters cost: memory, seconds of an iteration, seconds on the host's link. Without them, an iteration costs what it did."""

import pytest

from stallfree.core.adapters import Resident
from stallfree.perf import hardware, shape
from stallfree.perf.adapters import Adapters
from stallfree.perf.roofline import ENGINES, Roofline
from stallfree.perf.shape import Sharded
from stallfree.sim.shelf import HOST_LINK, Shelf, ranks

HYBRID = [(2048, 1)] * 32 + [(0, 512), (4096, 96)]
DECODES = [(700, 1)] * 9
BEFORE = [
    ("vllm-2026", "llama2-7b", 1, "0x1.07ba67bad1c02p-4", "0x1.a5f0d234fde8ap-7", 2176),
    ("graph", "llama2-70b", 4, "0x1.232a196d526cfp-3", "0x1.05076036a3f92p-5", 256),
    ("eager-2024", "llama2-7b", 1, "0x1.13ab98af43020p-4", "0x1.e6d954ca823b2p-6", 1920),
    ("vllm-2023", "llama2-70b", 4, "0x1.387bcea6c2c15p-3", "0x1.8193ab5de46f7p-5", 192),
    ("fused", "llama2-7b", 1, "0x1.05a5ba84a32fep-4", "0x1.9f1ffd9bb4002p-7", 2176),
]
"""Seconds of `HYBRID` and of `DECODES`, and the room in 200 ms after `HYBRID`, before there were adapters."""


def roofline(
    model: str = "llama2-7b", tp: int = 1, engine: str = "vllm-2026", adapters: str = "attention", pp: int = 1
) -> Roofline:
    return Roofline(hardware.load("a100-80g"), Sharded(shape.load(model), tp, pp), engine, adapters=adapters)


@pytest.mark.parametrize("modules", ["attention", "all"])
@pytest.mark.parametrize(("engine", "model", "tp", "hybrid", "decodes", "room"), BEFORE)
def test_an_iteration_without_adapters_costs_to_the_last_bit_what_it_did(engine, model, tp, hybrid, decodes, room, modules):
    cost = roofline(model, tp, engine, modules)
    assert (hybrid, decodes) == (cost.seconds(HYBRID).hex(), cost.seconds(DECODES).hex())
    assert room == cost.room(HYBRID, 0, 4000, 0.2)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("work", [HYBRID, DECODES, [(0, 640)]])
def test_operators_and_stages_add_up_with_adapters(engine, work):
    for cost in (roofline(engine=engine, adapters="all"), roofline("llama2-70b", 2, engine, pp=2)):
        with_adapters = [(96, -1), *work]
        assert cost.seconds(with_adapters) == pytest.approx(sum(op.count * op.cost.seconds for op in cost.operators(with_adapters)))
        assert cost.seconds(with_adapters) == pytest.approx(sum(cost.stages(with_adapters)))
        assert "adapters" in {op.name for op in cost.operators(with_adapters)}


def test_more_ranks_and_more_matrices_cost_more():
    costs = [roofline().seconds([(total, -1), *HYBRID]) for total in (8, 64, 512, 4096)]
    assert [roofline().seconds(HYBRID), *costs] == sorted({roofline().seconds(HYBRID), *costs})
    assert roofline(adapters="all").seconds([(64, -1), *HYBRID]) > roofline().seconds([(64, -1), *HYBRID])


def test_ranks_in_several_pieces_are_added():
    assert roofline().seconds([(72, -1), *HYBRID]) == roofline().seconds([(8, -1), (64, -1), *HYBRID])


def test_the_batch_of_a_leap_costs_what_its_shape_does():
    cost = roofline()
    assert cost.seconds([(64, -1), *DECODES]) == cost.batch(9, 9 * 700, [(64, -1)])


@pytest.mark.parametrize("limit", [0.05, 0.08, 0.2])
@pytest.mark.parametrize("total", [8, 1024])
def test_the_room_beside_adapters_is_within_the_limit(limit, total):
    cost, work = roofline(adapters="all"), [(total, -1), *DECODES]
    room = cost.room(work, 0, 4000, limit)
    assert 0 < room <= cost.room(DECODES, 0, 4000, limit)
    assert cost.seconds([*work, (0, room)]) <= limit


def test_no_time_is_less_than_that_of_the_adapters_bytes():
    cost, total = roofline(), 64 * 100
    less = cost.seconds([(total, -1), *DECODES]) - cost.seconds(DECODES)
    assert less > 100 * cost.adapters.bytes(64) / cost.device.bandwidth


def test_an_adapter_is_as_large_as_its_matrices():
    # Rank 8 on q, k, v and o, each 4,096 x 4,096, in 32 layers, 2 bytes a number: 16.8 MB.
    assert 8 * 4 * (4096 + 4096) * 32 * 2 == roofline().adapters.bytes(8)
    # Also on gate, up and down, 4,096 x 11,008.
    assert 8 * (4 * (4096 + 4096) + 3 * (4096 + 11008)) * 32 * 2 == roofline(adapters="all").adapters.bytes(8)


def test_a_part_of_a_device_group_holds_a_part_of_an_adapter():
    whole, part = (roofline("llama2-70b", tp).adapters for tp in (2, 4))
    assert whole.bytes(8) / 2 < part.bytes(8) < whole.bytes(8)


def test_blocks_are_rounded_up():
    adapters = roofline().adapters
    block = 16 * 2 * 32 * 128 * 2 * 32
    assert -(-adapters.bytes(8) // block) == adapters.blocks(8, 16)
    assert adapters.blocks(8, 16) <= adapters.blocks(9, 16)


def test_unknown_matrices_are_named():
    with pytest.raises(ValueError, match="--adapter-modules 'al' is unknown.*did you mean 'all'.*known: attention, all"):
        roofline(adapters="al")


def test_the_shelf_gives_ranks_in_turn():
    shelf = Shelf((8, 16, 32), lambda rank: rank // 4, lambda rank: rank / 1000)
    for adapter in ("0", "4", "2", "0"):
        shelf.meet(adapter)
    assert {"0": (2, 8), "4": (4, 16), "2": (8, 32)} == shelf.known
    assert 0.016 == shelf.load_s(Resident("4", 16, [1, 2, 3, 4]))


def test_a_load_takes_its_bytes_on_the_host_link():
    adapters: Adapters = roofline().adapters
    shelf = Shelf.of((8,), adapters, 16)
    shelf.meet("7")
    assert {"7": (adapters.blocks(8, 16), 8)} == shelf.known
    assert adapters.bytes(8) / HOST_LINK == shelf.load_s(Resident("7", 8, []))


@pytest.mark.parametrize(("words", "expected"), [("8", (8,)), ("8,16, 32", (8, 16, 32)), ("1024", (1024,))])
def test_ranks_are_read(words, expected):
    assert expected == ranks(words)


@pytest.mark.parametrize("words", ["", "0", "-8", "x", "8,", "8;16", "1025", "8.5"])
def test_what_is_no_list_of_ranks_is_named(words):
    with pytest.raises(ValueError, match="is no list of ranks from 1 to 1,024; write 8 or 8,16,32"):
        ranks(words)
