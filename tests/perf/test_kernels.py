"""Kernels never beat the data sheet, cost more for more work, and fall short of it where real ones do."""

from dataclasses import replace

import pytest

from stallfree.perf import hardware, kernels
from stallfree.perf.kernels import Attention, all_reduce, send
from stallfree.perf.shape import Matrix, Sharded, load

A100 = hardware.load("a100-80g")
SQUARE = Matrix("square", 4096, 4096)
GENERATIONS = [(name, year) for name in hardware.names() for year in hardware.load(name).measured]


@pytest.fixture(params=GENERATIONS, ids=" ".join)
def generation(request):
    """A device, and the kernels of one generation of libraries on it."""
    name, year = request.param
    device = hardware.load(name)
    return device, device.measured[year]


def matmul(tokens, matrix, device=A100, year="2024"):
    return kernels.matmul(device, device.kernels(year), tokens, matrix)


@pytest.mark.parametrize("matrix", [SQUARE, Matrix("flat", 1024, 8192), Matrix("experts", 7168, 4096, "fp16", 8, 2)])
@pytest.mark.parametrize("precision", ["fp16", "fp8", "fp8-block", "int8", "int4"])
def test_no_matrix_product_beats_its_limits(generation, matrix, precision):
    for tokens in (1, 7, 64, 513, 4096):
        cost = kernels.matmul(*generation, tokens, replace(matrix, precision=precision))
        assert max(cost.compute_s, cost.bandwidth_s, cost.launch_s) <= cost.seconds


def test_more_tokens_never_take_less(generation):
    seconds = [kernels.matmul(*generation, tokens, SQUARE).seconds for tokens in range(1, 1500)]
    assert sorted(seconds) == seconds


def test_a_single_token_is_held_up_by_the_weights_and_many_by_arithmetic(generation):
    big = Matrix("big", 16384, 8192)
    assert ["bandwidth", "compute"] == [kernels.matmul(*generation, tokens, big).limit[0] for tokens in (1, 8192)]


def test_large_products_sustain_the_share_of_the_peak_that_was_measured():
    cost = matmul(8192, Matrix("large", 16384, 8192))
    assert A100.measured["2024"].products["fp16"].compute * 0.9 == pytest.approx(cost.compute_s / cost.seconds, rel=0.1)


def test_a_tile_more_than_the_processors_take_costs_a_wave():
    """108 processors take 108 tiles of 128 x 128 at once; the first tile after that waits for the next wave."""
    rows, columns = 128 * 27, 16384
    last, next_one = (matmul(tokens, Matrix("waves", rows, columns)).seconds for tokens in (512, 513))
    assert next_one > 1.1 * last


def test_weights_of_fewer_bits_are_read_sooner():
    by_precision = {p: matmul(1, replace(SQUARE, precision=p)).seconds for p in ("fp16", "fp8", "int4")}
    assert by_precision["int4"] < by_precision["fp8"] < by_precision["fp16"]


def test_only_a_device_with_a_rate_for_it_multiplies_in_fewer_bits():
    big = Matrix("big", 16384, 8192, "fp8")
    assert matmul(8192, big).compute_s == matmul(8192, replace(big, precision="fp16")).compute_s
    h100 = hardware.load("h100")
    assert 0.5 == pytest.approx(
        matmul(8192, big, h100).compute_s / matmul(8192, replace(big, precision="fp16"), h100).compute_s, rel=0.01
    )


def test_experts_in_fp8_have_a_tile_for_any_number_of_tokens():
    """On average an expert meets a fraction of a token more or less."""
    experts = Matrix("experts", 14336, 4096, "fp8", 8, 2)
    assert all(matmul(tokens, experts, hardware.load("h100"), "2026").seconds < 1e-3 for tokens in range(1, 600))


@pytest.mark.parametrize(("tokens", "experts"), [(1, 2.0), (4, 5.5), (16, 7.9), (10_000, 8.0)])
def test_only_the_experts_that_a_token_meets_are_read(tokens, experts):
    """Mixtral 8x7B: E (1 - (1 - k / E)^b) of its E = 8 experts, of which each of b tokens meets k = 2."""
    *_, down = Sharded(load("mixtral-8x7b")).layer()
    assert experts == pytest.approx(down.met(tokens), abs=0.05)
    read = matmul(tokens, down).bandwidth_s * A100.bandwidth - 2 * tokens * 2 * (down.rows + down.columns)
    assert down.met(tokens) == pytest.approx(read / (2 * down.rows * down.columns))


@pytest.mark.parametrize("tokens", [1, 3, 1000])
def test_a_dense_matrix_is_read_whole_to_the_last_bit(tokens):
    assert 1.0 == SQUARE.met(tokens)


def test_few_tokens_meet_few_experts():
    experts = Matrix("experts", 14336, 4096, "fp16", 8, 2)
    single, many = (matmul(tokens, experts).bandwidth_s for tokens in (1, 256))
    assert 4 == pytest.approx(many / single, rel=0.05)


def test_experts_do_the_work_of_those_that_are_active():
    experts, active = Matrix("experts", 14336, 4096, "fp16", 8, 2), Matrix("active", 2 * 14336, 4096)
    assert matmul(4096, active).compute_s == matmul(4096, experts).compute_s


def test_weights_of_fewer_bits_are_multiplied_in_16():
    h100, big = hardware.load("h100"), Matrix("big", 16384, 8192)
    whole, *fewer = (matmul(8192, replace(big, precision=p), h100, "2026") for p in ("fp16", "int8", "int4"))
    assert [whole.compute_s] * 2 == [cost.compute_s for cost in fewer]
    assert all(cost.seconds > whole.seconds for cost in fewer)


def test_activations_are_quantised_before_a_product_in_fp8():
    h100, wide = hardware.load("h100"), Matrix("wide", 1024, 65536, "fp8")
    measured = h100.kernels("2026")
    few, many = (kernels.quantise(h100, measured, tokens, wide) for tokens in (1, 4096))
    assert kernels.QUANTISE_S == pytest.approx(few, rel=0.01)
    assert 3 * 4096 * 65536 / h100.bandwidth < many < matmul(4096, wide, h100, "2026").seconds
    assert 0.0 == kernels.quantise(h100, measured, 4096, replace(wide, precision="int8"))


@pytest.mark.parametrize("name", kernels.ELEMENTWISE)
def test_elementwise_kernels_stay_within_bandwidth_and_launch(generation, name):
    for tokens in (1, 100, 4096):
        cost = kernels.elementwise(*generation, name, tokens, 4096)
        assert max(cost.bandwidth_s, cost.launch_s) <= cost.seconds


def attention(kv_heads: int = 8, heads: int = 32, year: str = "2024", device=A100, **more) -> Attention:
    return Attention(device, device.kernels(year).attention["fp16"], heads, kv_heads, 128, 2 * kv_heads * 128 * 2, **more)


def test_decodes_read_their_kv_once():
    once, twice = (attention().cost_of_decodes(16, context) for context in (100_000, 200_000))
    assert 100_000 * 4096 / A100.bandwidth == pytest.approx(twice.bandwidth_s - once.bandwidth_s)
    assert "bandwidth" == twice.limit[0]


def test_many_short_sequences_are_held_up_by_their_tiles():
    """As measured on an A100: 2,048 sequences of 4 tokens with 8 KV heads take 0.7 ms, and reading their KV 0.02 ms."""
    kernel = attention(heads=64, year="2026")
    assert 0.7e-3 == pytest.approx(kernel.decodes(2048, 8192), rel=0.15)
    assert kernel.decodes(1, 8192) < 0.1 * kernel.decodes(2048, 8192)


def test_few_sequences_do_not_reach_the_bandwidth():
    alone, among = attention(1, 8, "2026").decodes(1, 2**17), attention(1, 8, "2026").decodes(16, 2**17)
    assert alone > 1.3 * among


def test_heads_that_share_no_kv_are_not_split_where_kernels_cannot():
    shared, own = attention(8, 32, "2026").decodes(1, 4096), attention(32, 32, "2026").decodes(1, 4096)
    assert own > 2 * shared
    assert attention(32, 32, "2026", hardware.load("h100")).decodes(1, 4096) < 0.5 * own


def test_kv_in_the_cache_is_read_sooner():
    h100 = hardware.load("h100")
    warm, cold = (attention(year="2026", device=h100, warm=warm) for warm in (True, False))
    assert warm.decodes(8, 4096) < cold.decodes(8, 4096)
    assert warm.decodes(64, 2**20) == cold.decodes(64, 2**20)


def test_a_prompt_in_chunks_has_the_pairs_of_the_whole_but_for_the_tiles_on_the_diagonal():
    whole = attention().sums([(0, 8192)]).pairs
    chunks = sum(attention().sums([(start, 512)]).pairs for start in range(0, 8192, 512))
    assert whole == chunks == 8192 * (8192 + 128) / 2


def test_kernels_that_do_not_skip_the_mask_compute_the_square():
    assert 4096 * 4096 == attention(masked=1.0).sums([(0, 4096)]).pairs


def test_a_short_chunk_over_long_context_pays_for_splitting_it():
    kernel = attention()
    short, long = kernel.sums([(64, 64)]), kernel.sums([(64, 2048)])
    assert [True, False] == [short.split, long.split]
    unsplit = short._replace(split=False)
    assert A100.measured["2024"].attention["fp16"].split_s == pytest.approx(kernel.chunks(short) - kernel.chunks(unsplit))


def test_no_chunk_ends_before_its_longest_tile():
    """One head of a long prompt has few tiles, so most processors wait for the last."""
    kernel = attention(1, 1, "2026")
    one, eight = (kernel.chunks(kernel.sums([(0, 8192)] * number)) for number in (1, 8))
    assert eight < 4 * one


def test_a_chunk_reads_the_kv_before_it_even_if_it_computes_little():
    cost = attention(32).cost_of_chunks(attention(32).sums([(100_000, 2)]))
    assert "bandwidth" == cost.limit[0]
    assert cost.seconds > cost.bandwidth_s


def test_a_ring_moves_twice_the_data_but_for_each_ones_part():
    nvlink = A100.links["nvlink"]
    assert 1.75e8 / nvlink.ring == pytest.approx(all_reduce(nvlink, 8, 8, 1e8, False).link_s)


def test_ranks_in_step_do_not_wait_for_each_other():
    pcie = hardware.load("a40").links["pcie"]
    in_step, one_by_one = (all_reduce(pcie, 2, 2, 1000, in_step).seconds for in_step in (True, False))
    assert pcie.collective_s - pcie.step_s == pytest.approx(one_by_one - in_step)


def test_a_graph_sums_small_messages_in_a_step_larger_ones_in_two_and_the_largest_in_a_ring():
    nvlink = hardware.load("h100").links["nvlink"]
    small, middle, large = (all_reduce(nvlink, 8, 8, size, True) for size in (1e4, 2e6, 1e9))
    steps = nvlink.graph.step_s, 2 * nvlink.graph.step_s, nvlink.graph.start_s + 8 * nvlink.graph.rank_s
    assert steps == (small.launch_s, middle.launch_s, large.launch_s)
    assert small.seconds < 6e-6


def test_a_whole_nodes_ring_is_faster_because_its_switch_adds():
    nvlink = hardware.load("h100").links["nvlink"]
    four, eight = (all_reduce(nvlink, devices, devices, 1e9, True).seconds for devices in (4, 8))
    assert eight < four


def test_boxes_without_a_switch_fall_behind_beyond_two_devices():
    l40s = hardware.load("l40s")
    two, four = (all_reduce(l40s.link(devices, 8), devices, devices, 1e7, True).seconds for devices in (2, 4))
    assert four > 5 * two


def test_all_reduce_between_nodes_is_slower_than_within():
    assert (
        all_reduce(A100.links["ethernet"], 8, 4, 1e7, False).seconds
        > 5 * all_reduce(A100.links["nvlink"], 8, 8, 1e7, False).seconds
    )


def test_a_message_takes_its_latency_and_its_bytes():
    nvlink = A100.links["nvlink"]
    assert nvlink.latency_s + 1e9 / nvlink.bandwidth == send(nvlink, 1e9).seconds


def test_bf16_costs_what_fp16_costs():
    costs = {form: matmul(512, Matrix("up", 4096, 4096, form)) for form in ("bf16", "fp16")}
    assert costs["fp16"] == costs["bf16"]
