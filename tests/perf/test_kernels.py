"""Kernels never beat the data sheet, cost more for more work, and fall short of it where real ones do."""

from dataclasses import replace

import pytest

from stallfree.perf import hardware, kernels
from stallfree.perf.kernels import Attention, all_reduce, elementwise, matmul, send
from stallfree.perf.shape import Matrix

A100 = hardware.load("a100-80g")
SQUARE = Matrix("square", 4096, 4096)


@pytest.fixture(params=hardware.names())
def device(request):
    return hardware.load(request.param)


@pytest.mark.parametrize("matrix", [SQUARE, Matrix("flat", 1024, 8192), Matrix("experts", 7168, 4096, "fp16", 8, 2)])
@pytest.mark.parametrize("precision", ["fp16", "fp8", "int8", "int4"])
def test_no_matrix_product_beats_its_limits(device, matrix, precision):
    for tokens in (1, 7, 64, 513, 4096):
        cost = matmul(device, tokens, replace(matrix, precision=precision))
        assert max(cost.compute_s, cost.bandwidth_s, cost.launch_s) <= cost.seconds


def test_more_tokens_never_take_less(device):
    seconds = [matmul(device, tokens, SQUARE).seconds for tokens in range(1, 1500)]
    assert sorted(seconds) == seconds


def test_a_single_token_is_held_up_by_the_weights_and_many_by_arithmetic(device):
    big = Matrix("big", 16384, 8192)
    assert ["bandwidth", "compute"] == [matmul(device, tokens, big).limit[0] for tokens in (1, 8192)]


def test_large_products_sustain_the_share_of_the_peak_that_was_measured():
    cost = matmul(A100, 8192, Matrix("large", 16384, 8192))
    assert A100.measured.compute * 0.9 == pytest.approx(cost.compute_s / cost.seconds, rel=0.1)


def test_a_tile_more_than_the_processors_take_costs_a_wave():
    """108 processors take 108 tiles of 128 x 128 at once; the first tile after that waits for the next wave."""
    rows, columns = 128 * 27, 16384
    last, next_one = (matmul(A100, tokens, Matrix("waves", rows, columns)).seconds for tokens in (512, 513))
    assert next_one > 1.1 * last


def test_weights_of_fewer_bits_are_read_sooner():
    by_precision = {p: matmul(A100, 1, replace(SQUARE, precision=p)).seconds for p in ("fp16", "fp8", "int4")}
    assert by_precision["int4"] < by_precision["fp8"] < by_precision["fp16"]


def test_only_a_device_with_a_rate_for_it_multiplies_in_fewer_bits():
    big = Matrix("big", 16384, 8192, "fp8")
    assert matmul(A100, 8192, big).compute_s == matmul(A100, 8192, replace(big, precision="fp16")).compute_s
    h100 = hardware.load("h100")
    assert 0.5 == pytest.approx(
        matmul(h100, 8192, big).compute_s / matmul(h100, 8192, replace(big, precision="fp16")).compute_s, rel=0.01
    )


def test_few_tokens_meet_few_experts():
    experts = Matrix("experts", 14336, 4096, "fp16", 8, 2)
    single, many = (matmul(A100, tokens, experts).bandwidth_s for tokens in (1, 256))
    assert 4 == pytest.approx(many / single, rel=0.05)


def test_experts_do_the_work_of_those_that_are_active():
    experts, active = Matrix("experts", 14336, 4096, "fp16", 8, 2), Matrix("active", 2 * 14336, 4096)
    assert matmul(A100, 4096, active).compute_s == matmul(A100, 4096, experts).compute_s


@pytest.mark.parametrize("name", kernels.ELEMENTWISE)
def test_elementwise_kernels_stay_within_bandwidth_and_launch(device, name):
    for tokens in (1, 100, 4096):
        cost = elementwise(device, name, tokens, 4096)
        assert max(cost.bandwidth_s, cost.launch_s) <= cost.seconds


def attention(masked: float = 0.0, kv_heads: int = 8) -> Attention:
    return Attention(A100, 32, kv_heads, 128, 2 * kv_heads * 128 * 2, masked)


def test_decodes_read_their_kv_once():
    once, twice = (attention().cost_of_decodes(16, context) for context in (100_000, 200_000))
    assert 100_000 * 4096 / A100.bandwidth == pytest.approx(twice.bandwidth_s - once.bandwidth_s)
    assert "bandwidth" == twice.limit[0]


def test_a_prompt_in_chunks_has_the_pairs_of_the_whole_but_for_the_tiles_on_the_diagonal():
    whole = attention().pairs(0, 8192)
    chunks = sum(attention().pairs(start, 512) for start in range(0, 8192, 512))
    assert whole == chunks == 8192 * (8192 + 128) / 2


def test_kernels_that_do_not_skip_the_mask_compute_the_square():
    assert 4096 * 4096 == attention(masked=1.0).pairs(0, 4096)


def test_a_short_chunk_over_long_context_pays_for_splitting_it():
    short, long = attention().chunks(64, 4096, 0.0), attention().chunks(800, 4096, 0.0)
    assert A100.measured.split_s == pytest.approx(short - long, rel=0.1)


def test_a_chunk_reads_the_kv_before_it_even_if_it_computes_little():
    cost = attention(kv_heads=32).cost_of_chunks(2, 100_000, attention().pairs(100_000, 2))
    assert "bandwidth" == cost.limit[0]
    assert cost.seconds > cost.bandwidth_s


def test_a_ring_moves_twice_the_data_but_for_each_ones_part():
    nvlink = A100.links["nvlink"]
    assert 1.75e8 / nvlink.ring == pytest.approx(all_reduce(nvlink, 8, 8, 1e8, False).link_s)


def test_ranks_in_step_do_not_wait_for_each_other():
    nvlink = A100.links["nvlink"]
    in_step, one_by_one = (all_reduce(nvlink, 2, 2, 1000, in_step).seconds for in_step in (True, False))
    assert nvlink.collective_s - nvlink.step_s == pytest.approx(one_by_one - in_step)


def test_all_reduce_between_nodes_is_slower_than_within():
    assert (
        all_reduce(A100.links["ethernet"], 8, 4, 1e7, False).seconds
        > 5 * all_reduce(A100.links["nvlink"], 8, 8, 1e7, False).seconds
    )


def test_a_message_takes_its_latency_and_its_bytes():
    nvlink = A100.links["nvlink"]
    assert nvlink.latency_s + 1e9 / nvlink.bandwidth == send(nvlink, 1e9).seconds


def test_bf16_costs_what_fp16_costs():
    costs = {form: kernels.matmul(A100, 512, Matrix("up", 4096, 4096, form)) for form in ("bf16", "fp16")}
    assert costs["fp16"] == costs["bf16"]
