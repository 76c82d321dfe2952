"""Sequence parallelism: prices beside LoongServe's measurements, and what must hold for any of them."""

import csv
from pathlib import Path
from statistics import median

import pytest

from stallfree.perf import hardware, shape
from stallfree.perf.roofline import Roofline
from stallfree.perf.shape import Sharded

MEASURED = Path(__file__).parents[2] / "benchmarks" / "data" / "loongserve.csv"
WORK = [(0, 40_000), (9000, 1000)]


def cost(sp: int = 1, tp: int = 2, device: str = "a800") -> Roofline:
    return Roofline(hardware.load(device), Sharded(shape.load("llama2-7b"), tp), "graph", sp=sp)


def priced() -> dict[tuple[int, int, int], tuple[float, float]]:
    """(batch, tokens, sp) -> milliseconds as measured and as priced."""
    prices: dict[tuple[int, int, int], tuple[float, float]] = {}
    with MEASURED.open(newline="") as file:
        for row in csv.DictReader(file):
            batch, tokens, sp = (int(row[key]) for key in ("batch", "prompt_tokens", "sp"))
            seconds = cost(sp, int(row["tp"])).seconds([(0, tokens)] * batch)
            prices[batch, tokens, sp] = float(row["prefill_ms"]), 1000 * seconds
    return prices


def test_prices_are_near_loongserves_measurements():
    errors = sorted(abs(price / measured - 1) for measured, price in priced().values())
    assert len(errors) == 12
    assert median(errors) <= 0.12
    assert errors[len(errors) * 9 // 10] <= 0.25


def test_tensor_parallelism_overtakes_a_ring_where_it_was_measured_to():
    prices = priced()
    for batch, tokens in {(batch, tokens) for batch, tokens, _ in prices}:
        (tp_measured, tp_priced), (sp_measured, sp_priced) = prices[batch, tokens, 1], prices[batch, tokens, 4]
        assert (tp_measured < sp_measured) == (tp_priced < sp_priced)


@pytest.mark.parametrize("work", [WORK, [(2000, 1)] * 8, [*WORK, (2000, 1)]])
def test_operators_add_up(work):
    ring = cost(sp=4)
    assert ring.seconds(work) == pytest.approx(sum(op.count * op.cost.seconds for op in ring.operators(work)))


def test_more_groups_take_less_time_for_a_long_prompt_and_more_for_a_short_one():
    alone, two, four = (cost(sp) for sp in (1, 2, 4))
    assert four.seconds(WORK) < two.seconds(WORK) < alone.seconds(WORK)
    assert four.seconds([(0, 16)]) > alone.seconds([(0, 16)])


def test_a_slow_link_is_what_a_ring_waits_for():
    """Between nodes KV of short prompts is longer on its way than attention takes."""
    near, far = (Roofline(hardware.load("a800"), Sharded(shape.load("llama2-7b"), 2), "graph", node=node, sp=4) for node in (8, 2))
    batch = [(0, 1000)] * 64
    attention = next(op for op in far.operators(batch) if op.name == "attention, chunks")
    assert far.seconds(batch) > 2 * near.seconds(batch)
    assert attention.cost.limit[0] == "link"


@pytest.mark.parametrize(("sp", "pp"), [(0, 1), (-1, 1), (2, 2)])
def test_what_has_no_price_is_refused(sp, pp):
    with pytest.raises(ValueError, match=f"sequence parallelism {sp} with {pp} pipeline stages has no price"):
        Roofline(hardware.load("a800"), Sharded(shape.load("llama2-7b"), 1, pp), sp=sp)
