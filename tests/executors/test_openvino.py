"""The graph computes what `transformers` computes, however the tokens are cut and batched; plans that cannot run are refused."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stallfree.checkpoint import Checkpoint, open_checkpoint
from stallfree.core.plan import Plan, Work
from stallfree.executors.openvino import OpenVINOExecutor
from stallfree.executors.openvino import recipe as module
from stallfree.transfer.forms import Form
from tests.models import reference, write_folder, write_gguf

pytest.importorskip("torch")
pytest.importorskip("transformers")

KV = 1 << 21
TOKENS = np.random.default_rng(1).integers(3, 160, 75).tolist()
"""More than two KV blocks of 32."""

CLOSE = 0.15
"""How far rounded weights or keys may move a logit on average, in standard deviations: random weights amplify what is small in a
trained model, and a mistake moves it by more than 1."""
CLOSE_4_BITS = 0.4
"""The same with values, or keys and values, in 4 bits."""

EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
GPT_OSS = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 20,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 1e4,
        "truncate": False,
    },
}
MODELS = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama one KV head": ("llama", {"num_key_value_heads": 1}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama 3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 5e5,
            }
        },
    ),
    "llama yarn": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}},
    ),
    "llama dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}),
    "llama longrope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0 + i / 7 for i in range(16)],
                "long_factor": [4.0 + i for i in range(16)],
                "original_max_position_embeddings": 128,
                "rope_theta": 1e4,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral window": ("mistral", {"sliding_window": 20}),
    "qwen2": ("qwen2", {"use_sliding_window": False, "sliding_window": 20}),
    "qwen2 window": ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "granite": (
        "granite",
        {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0156},
    ),
    "granite tied": (
        "granite",
        {"embedding_multiplier": 6.0, "logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1}
        | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1], "layer_types": ["full_attention"] * 3}),
    "olmo2": ("olmo2", {}),
    "olmo2 biases": ("olmo2", {"attention_bias": True, "num_key_value_heads": 4}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3 window": ("phi3", {"sliding_window": 20}),
    "phi3 partial": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}, "sliding_window": None},
    ),
    "phi4 mini": (
        "phi3",
        {
            "sliding_window": None,
            "head_dim": 24,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope",
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0 + i / 7 for i in range(9)],
                "long_factor": [4.0 + i for i in range(9)],
                "original_max_position_embeddings": 128,
                "rope_theta": 1e4,
            },
        },
    ),
    "gemma3": (
        "gemma3_text",
        {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 20}
        | {"query_pre_attn_scalar": 24},
    ),
    "gemma3 untied": (
        "gemma3_text",
        {"layer_types": ["sliding_attention"] * 3, "sliding_window": 30, "tie_word_embeddings": False},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "mixtral window": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 20}),
    "qwen3 moe": ("qwen3_moe", EXPERTS | {"norm_topk_prob": True}),
    "qwen3 moe shares of all": ("qwen3_moe", EXPERTS | {"use_sliding_window": True, "sliding_window": 20, "attention_bias": True}),
    "gpt oss": ("gpt_oss", GPT_OSS),
    "gpt oss clamped": ("gpt_oss", GPT_OSS | {"swiglu_limit": 0.5, "swiglu_alpha": 1.3, "num_experts_per_tok": 1}),
}


def work(tokens: list[int], start: int = 0, *, id: str = "a", first_block: int = 0, samples: bool = True) -> Work:
    blocks = tuple(range(first_block, first_block + 3))
    return Work(id, start, len(tokens), samples, False, tuple(tokens), blocks, None, "", tuple(tokens), [])


def chunked(executor: OpenVINOExecutor, sizes: list[int], first_block: int = 0) -> np.ndarray:
    """Logits of all of TOKENS, computed in chunks of the given sizes."""
    rows, start = [], 0
    for count in sizes:
        rows.append(executor.logits([work(TOKENS[start : start + count], start, first_block=first_block)]))
        start += count
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("llama")
    write_folder(folder, "llama")
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def exact(llama: Checkpoint) -> Iterator[OpenVINOExecutor]:
    executor = OpenVINOExecutor(llama, weights="f32", kv="f32", kv_bytes=KV)
    yield executor
    executor.close()


@pytest.fixture(scope="module")
def default(llama: Checkpoint) -> Iterator[OpenVINOExecutor]:
    executor = OpenVINOExecutor(llama, kv_bytes=KV)
    yield executor
    executor.close()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, config = MODELS[name]
    model = write_folder(tmp_path, family, **config)
    executor = OpenVINOExecutor(open_checkpoint(tmp_path), weights="f32", kv="f32", kv_bytes=KV)
    expected = reference(model, TOKENS)
    np.testing.assert_allclose(executor.logits([work(TOKENS)]), expected, rtol=0, atol=2e-4 * np.abs(expected).max())
    # Decodes and chunks take other paths through the attention operator than a whole prompt.
    np.testing.assert_allclose(chunked(executor, [9, 30, 1, 1, 34]), expected, rtol=0, atol=2e-4 * np.abs(expected).max())


FILES = {
    "llama": ({}, {}),
    "qwen2": ({}, {}),
    "qwen3": ({}, {}),
    "granite": (
        {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22, "attention_multiplier": 0.125},
        {"embedding_scale": 12.0, "logit_scale": 8.0, "residual_scale": 0.22, "attention.scale": 0.125},
    ),
    "smollm3": (
        {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1], "layer_types": ["full_attention"] * 5},
        {"rope.freq_base": 2e6},
    ),
    "olmo2": ({}, {}),
    "phi3": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}, {}),
    "gemma3_text": (
        {"num_hidden_layers": 7, "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"]}
        | {"sliding_window": 20, "query_pre_attn_scalar": 32},
        {"rope.freq_base": 1e6, "attention.sliding_window": 20},
    ),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}, {"rope.freq_base": 1e6}),
    "qwen3_moe": (EXPERTS | {"norm_topk_prob": True}, {}),
    "gpt_oss": (
        GPT_OSS,
        {
            "attention.sliding_window": 20,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 8.0,
            "rope.scaling.original_context_length": 32,
        },
    ),
}


@pytest.mark.parametrize("family", FILES)
def test_a_gguf_file_is_the_same_model_as_the_folder(family: str, tmp_path: Path) -> None:
    config, values = FILES[family]
    write_folder(tmp_path / "folder", family, **config)
    folder = open_checkpoint(tmp_path / "folder")
    write_gguf(tmp_path / "model.gguf", folder, **values)
    results = []
    for checkpoint in (folder, open_checkpoint(tmp_path / "model.gguf")):
        executor = OpenVINOExecutor(checkpoint, weights="f32", kv="f32", kv_bytes=KV)
        results.append(executor.logits([work(TOKENS)]))
        executor.close()
    np.testing.assert_allclose(results[1], results[0], rtol=0, atol=1e-4 * np.abs(results[0]).max())


@pytest.mark.parametrize("sizes", [[75], [1] * 75, [32, 32, 11], [33, 42], [74, 1]])
def test_chunks_give_the_logits_of_the_whole(exact: OpenVINOExecutor, sizes: list[int]) -> None:
    whole = exact.logits([work(TOKENS)])
    np.testing.assert_allclose(chunked(exact, sizes, 3), whole, rtol=0, atol=1e-4 * np.abs(whole).max())


def test_a_hybrid_batch_gives_each_sequence_its_own_logits(exact: OpenVINOExecutor) -> None:
    alone = exact.logits([work(TOKENS)])
    exact.logits([work(TOKENS[:40], first_block=3), work(TOKENS[:64], first_block=6)])
    batch = [
        work(TOKENS[40:41], 40, id="decode", first_block=3),
        work(TOKENS[:20], id="prefill", first_block=9),
        work(TOKENS[64:], 64, id="chunk", first_block=6),
    ]
    expected = np.concatenate([alone[40:41], alone[:20], alone[64:]])
    np.testing.assert_allclose(exact.logits(batch), expected, rtol=0, atol=1e-4 * np.abs(alone).max())


def test_blocks_may_lie_in_any_order(exact: OpenVINOExecutor) -> None:
    scattered = work(TOKENS)._replace(blocks=(17, 2, 11))
    np.testing.assert_array_equal(exact.logits([work(TOKENS)]), exact.logits([scattered]))


def test_only_work_that_samples_gets_a_token(exact: OpenVINOExecutor) -> None:
    alone = exact.logits([work(TOKENS)])
    plan = Plan(7, 0.0, (work(TOKENS[:9], id="more", samples=False), work(TOKENS, id="last", first_block=3)))
    exact.submit(plan)
    result = exact.collect()
    assert 7 == result.step
    assert {"last": (int(alone[-1].argmax()),)} == result.tokens
    assert result.seconds > 0


def test_a_plan_may_sample_nothing(exact: OpenVINOExecutor) -> None:
    exact.submit(Plan(0, 0.0, (work(TOKENS[:9], samples=False),)))
    assert {} == exact.collect().tokens


def test_the_default_is_close_to_exact(exact: OpenVINOExecutor, default: OpenVINOExecutor) -> None:
    expected, logits = exact.logits([work(TOKENS)]), default.logits([work(TOKENS)])
    assert np.abs(logits - expected).mean() < CLOSE * expected.std()


def test_the_default_gives_the_same_logits_in_chunks(default: OpenVINOExecutor) -> None:
    np.testing.assert_array_equal(chunked(default, [75]), chunked(default, [30, 40, 5], 3))


@pytest.mark.parametrize(("weights", "kv"), [("int8", "f32"), ("f32", "u8"), ("bf16", "f32"), ("int8", "u4"), ("f32", "u4")])
def test_every_combination_of_formats_is_close_to_exact(llama: Checkpoint, exact: OpenVINOExecutor, weights: str, kv: str) -> None:
    executor = OpenVINOExecutor(llama, weights=weights, kv=kv, kv_bytes=KV)
    expected, logits = exact.logits([work(TOKENS)]), executor.logits([work(TOKENS)])
    assert np.abs(logits - expected).mean() < (CLOSE_4_BITS if kv == "u4" else CLOSE) * expected.std()


@pytest.mark.skipif(not module.has_bf16(), reason="no bfloat16 arithmetic")
@pytest.mark.parametrize(("weights", "kv"), [("int8", "bf16"), ("bf16", "bf16"), ("bf16", "u8"), ("bf16", "u4")])
def test_bfloat16_is_close_to_exact(llama: Checkpoint, exact: OpenVINOExecutor, weights: str, kv: str) -> None:
    executor = OpenVINOExecutor(llama, weights=weights, kv=kv, kv_bytes=KV)
    expected, logits = exact.logits([work(TOKENS)]), executor.logits([work(TOKENS)])
    assert np.abs(logits - expected).mean() < (CLOSE_4_BITS if kv == "u4" else CLOSE) * expected.std()


@pytest.mark.parametrize("kv", ["u8", "u4"])
def test_quantised_kv_gives_the_same_logits_in_chunks(llama: Checkpoint, kv: str) -> None:
    executor = OpenVINOExecutor(llama, weights="f32", kv=kv, kv_bytes=KV)
    np.testing.assert_allclose(chunked(executor, [30, 40, 5], 3), chunked(executor, [75]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kv", "bits"), [("f32", 64), ("u8", 16), ("u4", 12)])
def test_a_block_has_the_bits_of_its_numbers_and_the_scales(llama: Checkpoint, kv: str, bits: int) -> None:
    executor, config = OpenVINOExecutor(llama, kv=kv, kv_bytes=KV), llama.config
    vectors = config.num_layers * config.num_kv_heads * executor.capacity.block_size
    assert vectors * (config.head_dim * bits // 8 + (0 if kv == "f32" else 2 * 8)) == executor.block_bytes


@pytest.mark.parametrize(("kv", "name"), [("f32", "u8"), ("f32", "u4"), ("bf16", "u8"), ("u8", "u4")])
def test_kv_that_was_sent_with_fewer_bits_is_close_to_what_it_was(llama: Checkpoint, kv: str, name: str) -> None:
    if kv == "bf16" and not module.has_bf16():
        pytest.skip("no bfloat16 arithmetic")
    executor = OpenVINOExecutor(llama, weights="int8", kv=kv, kv_bytes=KV)
    form = Form.of(name, executor)
    assert form is not None
    executor.logits([work(TOKENS[:70])])
    last = work(TOKENS[70:], 70)
    expected = executor.logits([last]).copy()
    sent = bytearray(3 * executor.block_bytes)
    executor.read_blocks((0, 1, 2), memoryview(sent))
    packed = form.pack(memoryview(sent), 3, 70 - 64)
    executor.write_blocks((7, 8, 9), memoryview(form.unpack(memoryview(packed), 3)))
    logits = executor.logits([last._replace(blocks=(7, 8, 9))])
    assert len(packed) < len(sent)
    assert 0 < np.abs(logits - expected).mean() < (CLOSE_4_BITS if name == "u4" else CLOSE) * expected.std()


def test_the_default_needs_no_bfloat16(llama: Checkpoint, exact: OpenVINOExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_bf16", lambda: False)
    plain = OpenVINOExecutor(llama, kv_bytes=KV)
    expected, logits = exact.logits([work(TOKENS)]), plain.logits([work(TOKENS)])
    assert np.abs(logits - expected).mean() < CLOSE * expected.std()
    with pytest.raises(ValueError, match="no bfloat16 arithmetic; take weights 'file', 'int8' or 'f32'"):
        OpenVINOExecutor(llama, weights="bf16", kv_bytes=KV)


def test_a_width_that_no_group_divides_still_works(tmp_path: Path) -> None:
    model = write_folder(tmp_path, "llama", hidden_size=80, intermediate_size=144)
    executor = OpenVINOExecutor(open_checkpoint(tmp_path), kv="f32", kv_bytes=KV)
    expected = reference(model, TOKENS)
    assert np.abs(executor.logits([work(TOKENS)]) - expected).mean() < CLOSE * expected.std()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w._replace(blocks=(0, 1, 10**6)), "block number"),
        (lambda w: w._replace(blocks=(0, -1, 2)), "block number"),
        (lambda w: w._replace(blocks=(0, 1)), "3 are needed"),
        (lambda w: w._replace(tokens=(*w.tokens[:-1], 160)), "vocabulary of 160"),
        (lambda w: w._replace(tokens=(-1, *w.tokens[1:])), "vocabulary of 160"),
        (lambda w: w._replace(tokens=w.tokens[1:]), "74 token ids for 75"),
        (lambda w: w._replace(start=-1), "max_model_len"),
        (lambda w: w._replace(start=250), "max_model_len"),
        (lambda w: w._replace(count=0, tokens=()), "max_model_len"),
    ],
)
def test_a_plan_that_cannot_run_is_refused_by_name(exact: OpenVINOExecutor, change: Callable[[Work], Work], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        exact.submit(Plan(0, 0.0, (change(work(TOKENS)),)))
    assert "request a:" in str(caught.value)


def test_an_empty_plan_is_refused(exact: OpenVINOExecutor) -> None:
    with pytest.raises(ValueError, match="without work"):
        exact.submit(Plan(0, 0.0, ()))


def test_a_refused_plan_disturbs_nothing(exact: OpenVINOExecutor) -> None:
    before = exact.logits([work(TOKENS)])
    with pytest.raises(ValueError, match="request a: "):
        exact.submit(Plan(0, 0.0, (work(TOKENS)._replace(blocks=(99999,) * 3),)))
    exact.submit(Plan(1, 0.0, (work(TOKENS[-1:], 74),)))
    assert (int(before[-1].argmax()),) == exact.collect().tokens["a"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int3"}, "int8, bf16, f32"),
        ({"kv": "u9"}, "u8, u4, bf16, f32"),
        ({"max_model_len": 257}, "the model's 256"),
        ({"max_model_len": 0}, "the model's 256"),
        ({"threads": 0}, "at least 1"),
        ({"weights": "f32", "kv": "bf16"}, "take kv 'f32', 'u8' or 'u4'"),
        ({"kv_bytes": 100}, "less than one block of 32 tokens"),
    ],
)
def test_a_bad_option_is_refused_with_the_way_out(llama: Checkpoint, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OpenVINOExecutor(llama, **{"kv_bytes": KV, **options})


def test_a_family_that_it_does_not_know_is_refused(llama: Checkpoint) -> None:
    other = replace(llama, config=replace(llama.config, family="falcon"))
    with pytest.raises(ValueError, match="not 'falcon'; take --executor torch"):
        OpenVINOExecutor(other, kv_bytes=KV)


def test_a_kv_cache_beyond_memory_is_refused_before_it_is_allocated(llama: Checkpoint) -> None:
    with pytest.raises(
        MemoryError, match=r"KV cache 1048576\.\d+ GiB, and .* GiB of memory \(.*\) is available; give --kv-memory \d+MiB"
    ):
        OpenVINOExecutor(llama, kv_bytes=2**50)


def test_another_runtime_is_refused_with_the_version_to_install(llama: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("openvino.op._PagedAttentionExtension")
    with pytest.raises(RuntimeError, match=r"no paged-attention operator .* install openvino==2026\.4\.1"):
        OpenVINOExecutor(llama, kv_bytes=KV)


def signal_stack() -> int:
    """The address of this thread's stack for signals; 0 if it has none."""
    stack = (ctypes.c_size_t * 3)()  # stack_t: address, flags, size
    assert not ctypes.CDLL(None).sigaltstack(None, stack)
    return stack[0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's list of memory")
def test_executors_that_end_in_any_order_leave_a_stack_for_signals_that_is_there(tmp_path):
    write_folder(tmp_path, "llama")
    executors = [OpenVINOExecutor(open_checkpoint(tmp_path), kv_bytes=1 << 21) for _ in range(3)]
    for number in (0, 2, 1):
        executors[number].close()
    executors.clear()
    spans = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    stack = signal_stack()
    assert not stack or any(int(begin, 16) <= stack < int(end, 16) for begin, end in spans)
