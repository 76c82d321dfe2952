"""An iteration is the sum of its kernels and the engine around them, on any model, split, precision and device."""

import csv
import random
from pathlib import Path

import pytest

from stallfree.core.plan import Capacity
from stallfree.core.request import Request
from stallfree.perf import hardware, shape
from stallfree.perf.roofline import ENGINES, QUANTUM, Roofline
from stallfree.perf.shape import Sharded
from stallfree.policies.slo import Slo
from tests.virtual import run

PAPER = Path(__file__).parents[3] / "shared" / "data" / "paper"
HYBRID = [(2048, 1)] * 32 + [(0, 512), (4096, 96)]


def roofline(model: str = "llama2-7b", device: str = "a100-80g", engine: str = "graph", **split: object) -> Roofline:
    return Roofline(hardware.load(device), Sharded(shape.load(model), **split), engine)


@pytest.fixture(params=shape.names())
def model(request):
    return request.param


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("work", [[(700, 1)] * 9, [(0, 640)], HYBRID])
@pytest.mark.parametrize("split", [{}, {"tp": 4}, {"pp": 2}, {"tp": 2, "pp": 4, "weights": "fp8", "kv": "fp8"}])
def test_operators_and_stages_add_up(model, engine, work, split):
    cost = roofline(model, engine=engine, **split)
    assert cost.seconds(work) == pytest.approx(sum(op.count * op.cost.seconds for op in cost.operators(work)))
    assert cost.seconds(work) == pytest.approx(sum(cost.stages(work)))


@pytest.mark.parametrize("device", hardware.names())
def test_no_iteration_beats_the_data_sheet(device, model):
    cost = roofline(model, device, tp=2)
    flops = 544 / 2 * (cost.sharded.model.flops_per_token - 2 * cost.sharded.model.vocab_size * cost.sharded.model.hidden_size)
    assert cost.seconds(HYBRID) > flops / cost.device.peak["fp16"]


def test_more_devices_take_less_time():
    assert roofline(tp=4).seconds(HYBRID) < roofline(tp=2).seconds(HYBRID) < roofline().seconds(HYBRID)


def test_a_pipeline_takes_no_less_time_but_its_stages_are_shorter():
    alone, pipeline = roofline("llama2-70b", tp=2), roofline("llama2-70b", tp=2, pp=2)
    assert pipeline.seconds(HYBRID) > alone.seconds(HYBRID)
    assert 2 == len(pipeline.stages(HYBRID))
    assert 0.6 * alone.seconds(HYBRID) > max(pipeline.stages(HYBRID))


def test_the_sends_between_stages_are_within_a_node_while_it_has_room():
    a100, model = hardware.load("a100-80g"), shape.load("llama2-70b")
    near, far = (Roofline(a100, Sharded(model, 4, 2), node=node).sends(512) for node in (8, 4))
    assert [1, 1] == [len(near), len(far)]
    assert far[0] > 10 * near[0]
    crossing = Roofline(a100, Sharded(model, 4, 4), node=8).sends(512)
    assert [near[0], far[0], near[0]] == crossing


def test_tensor_parallelism_across_nodes_pays_for_the_network():
    a100, model = hardware.load("a100-80g"), shape.load("falcon-180b")
    inside, across = (Roofline(a100, Sharded(model, tp=8), node=node).seconds([(0, 512)]) for node in (8, 4))
    assert across > 1.5 * inside


def test_an_eager_engine_cannot_be_quicker_than_it_launches():
    eager = roofline("yi-34b", engine="eager-2024", tp=2)
    assert 60 * ENGINES["eager-2024"].layer_s < eager.seconds([(1, 1)])
    assert "waiting for launches" in [op.name for op in eager.operators([(1, 1)])]
    assert "waiting for launches" not in [op.name for op in eager.operators([(0, 4096)])]


def test_a_decode_costs_little_beside_others_and_a_token_much_beside_many():
    """On a GPU a batch of decodes reads the weights once; beyond some hundred tokens each is computed."""
    cost = roofline()
    single, double = (cost.seconds([(500, 1)] * n) for n in (1, 2))
    assert double < 1.1 * single
    assert 1.8 < cost.seconds([(0, 4096)]) / cost.seconds([(0, 2048)]) < 2.2


def test_quantised_weights_speed_up_decodes_and_a_quantised_cache_long_ones():
    assert roofline(weights="int4").seconds([(100, 1)]) < 0.6 * roofline().seconds([(100, 1)])
    assert roofline(kv="fp8").seconds([(4000, 1)] * 30) < 0.75 * roofline().seconds([(4000, 1)] * 30)


def test_room_is_the_most_that_stays_within_the_limit_in_whole_tiles():
    cost, rng = roofline(), random.Random(3)
    for _ in range(50):
        decodes = [(rng.randint(1, 3000), 1)] * rng.randint(0, 40)
        start, most, limit = rng.choice([0, 3000]), rng.randint(1, 2000), rng.uniform(0.01, 0.12)
        count = cost.room(decodes, start, most, limit)
        fits = [n for n in range(1, most + 1) if cost.seconds([*decodes, (start, n)]) <= limit]
        if count == most or not fits:
            assert (fits[-1] if fits else 0) == count
        else:
            assert fits[-1] - QUANTUM < count <= fits[-1]
            assert (len(decodes) + count) % QUANTUM == 0 or count == fits[-1] < QUANTUM


def test_no_work_takes_the_hosts_time_alone():
    assert ENGINES["graph"].iteration_s == roofline().seconds([])


def test_the_slo_policy_plans_with_it():
    requests = [Request(str(i), range(1000 * i, 1000 * i + 900), 8, arrival=0.01 * i) for i in range(6)]
    records = run(Slo("tbt=30ms", cost=roofline()), requests, Capacity(block_size=16, num_blocks=1000, max_model_len=2048))
    assert [8] * 6 == [len(r.output) for r in requests]
    assert not any(r.stalled for r in records)


def test_nothing_that_happens_changes_the_prices():
    cost = roofline()
    before = cost.seconds(HYBRID)
    cost.learn(HYBRID, 10 * before)
    assert before == cost.seconds(HYBRID)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: roofline(engine="eager"), "unknown engine 'eager' .did you mean 'eager-2024'"),
        (lambda: Roofline(hardware.load("a40"), Sharded(shape.load("llama2-7b")), node=9), "a node of a40 has 8 devices"),
        (
            lambda: Roofline(hardware.load("a40"), Sharded(shape.load("llama2-70b"), 8, 2), network="infiniband"),
            "no network 'infiniband'",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def yi_34b() -> list[tuple[str, int, float]]:
    """Iterations that Sarathi-Serve's figure 2 measured: decodes with 1,020 tokens before each, and whole prompts; without the
    prompt of 256 tokens, which ran first, as the warm-up.
    """
    if not PAPER.is_dir():
        return []
    iterations = []
    for kind in ("decode", "prefill"):
        with (PAPER / f"yi34b_figure-2_{kind}.csv").open() as file:
            iterations += [(kind, int(r["batch_num_tokens"]), float(r["batch_execution_time"])) for r in csv.DictReader(file)]
    return [row for row in iterations if row[:2] != ("prefill", 256)]


@pytest.mark.skipif(not PAPER.is_dir(), reason="the paper's measurements are not beside the checkout")
@pytest.mark.parametrize(("kind", "tokens", "measured"), yi_34b())
def test_iterations_of_the_papers_engine_are_met(kind, tokens, measured):
    if (kind, tokens) == ("decode", 8):
        pytest.xfail("the measurements leap by 21 ms from 4 decodes to 8, for which the model has no cause (docs/fidelity.md)")
    cost = roofline("yi-34b", "a100-80g-pcie", "eager-2024", tp=2)
    predicted = cost.seconds([(1020, 1)] * tokens if kind == "decode" else [(0, tokens)])
    assert predicted == pytest.approx(measured, rel=0.12)
