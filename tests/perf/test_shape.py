"""Models have their known numbers of parameters, and the parts on single devices add up."""

import json

import pytest

from stallfree.perf.shape import Sharded, load, names

KNOWN = {
    **{"mistral-7b": 7.242, "yi-34b": 34.389, "llama2-7b": 6.738, "llama2-13b": 13.016, "llama2-70b": 68.977, "llama3-8b": 8.030},
    **{"llama3-70b": 70.554, "codellama-34b": 33.744, "qwen2-72b": 72.706, "falcon-180b": 179.523, "opt-13b": 12.853},
    **{"opt-66b": 65.718, "opt-175b": 174.6, "mixtral-8x7b": 46.703, "qwen3-30b-a3b": 30.532, "llama3.2-1b": 1.236},
    "gpt-oss-20b": 20.915,
}
"""Billions of parameters, as the repositories' safetensors and the OPT paper count them."""

LLAMA = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32}
CONFIGS = {
    "llama2-7b": LLAMA | {"vocab_size": 32000, "max_position_embeddings": 4096},
    "mixtral-8x7b": LLAMA
    | {"model_type": "mixtral", "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 32000}
    | {"max_position_embeddings": 32768, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3-30b-a3b": {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768}
    | {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 48, "vocab_size": 151936}
    | {"max_position_embeddings": 40960, "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1}
    | {"mlp_only_layers": []},
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "head_dim": 64,
    }
    | {"num_key_value_heads": 8, "num_hidden_layers": 24, "vocab_size": 201088, "max_position_embeddings": 131072}
    | {"num_local_experts": 32, "num_experts_per_tok": 4, "tie_word_embeddings": False, "sliding_window": 128},
    "falcon-180b": {"model_type": "falcon", "hidden_size": 14848, "num_attention_heads": 232, "num_kv_heads": 8}
    | {"num_hidden_layers": 80, "vocab_size": 65024, "new_decoder_architecture": True, "tie_word_embeddings": False},
    "opt-13b": {"model_type": "opt", "hidden_size": 5120, "ffn_dim": 20480, "num_attention_heads": 40, "num_hidden_layers": 40}
    | {"vocab_size": 50272, "max_position_embeddings": 2048},
}


def write(folder, values) -> str:
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def test_every_built_in_model_is_known():
    assert set(KNOWN) == set(names())


@pytest.mark.parametrize("name", names())
def test_models_have_the_parameters_they_are_known_for(name):
    assert KNOWN[name] == pytest.approx(load(name).parameters / 1e9, rel=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_the_same_as_the_built_in(name, tmp_path):
    (tmp_path / name).mkdir()
    assert load(name) == load(write(tmp_path / name, CONFIGS[name]))


def test_a_model_has_its_repositorys_name_too():
    assert load("llama3-8b") == load("Meta-Llama-3-8B") == load("meta-llama/Meta-Llama-3-8B")


def test_operations_are_two_for_each_weight_that_a_token_meets():
    model = load("llama2-7b")
    assert 2 * (model.parameters - 32000 * 4096) == pytest.approx(model.flops_per_token, rel=1e-4)
    assert 12.88e9 == pytest.approx(load("mixtral-8x7b").flops_per_token / 2 + 32000 * 4096, rel=1e-2)


def test_operations_of_attention_are_four_for_each_number_of_the_query():
    assert 4 * 32 * 4096 == load("llama2-7b").flops_per_pair


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_the_parts_of_tensor_parallelism_make_the_whole(tp):
    whole, part = Sharded(load("llama3-70b")), Sharded(load("llama3-70b"), tp=tp)
    assert whole.weight_bytes / tp == pytest.approx(part.weight_bytes, rel=1e-3)
    assert whole.kv_bytes_per_token / tp == part.kv_bytes_per_token


def test_devices_beyond_the_kv_heads_hold_the_same_kv():
    assert Sharded(load("llama3-70b"), tp=8).kv_bytes_per_token == Sharded(load("llama3-70b"), tp=16).kv_bytes_per_token


def test_stages_share_the_layers():
    assert [27, 27, 26] == Sharded(load("llama2-70b"), pp=3).stages
    assert Sharded(load("llama2-70b")).weight_bytes / 2 == pytest.approx(Sharded(load("llama2-70b"), pp=2).weight_bytes, rel=1e-3)


def test_a_tied_embedding_is_held_once_but_by_both_ends_of_a_pipeline():
    opt = load("opt-13b")
    assert 2 * opt.parameters == pytest.approx(Sharded(opt).weight_bytes, rel=1e-4)
    assert Sharded(opt, pp=2).weight_bytes > opt.parameters


@pytest.mark.parametrize(("weights", "share"), [("fp8", 0.5), ("int8", 0.5), ("int4", 0.26)])
def test_fewer_bits_take_less_memory_but_for_the_embeddings(weights, share):
    model = load("qwen2-72b")
    ends = 4 * model.vocab_size * model.hidden_size
    whole, less = Sharded(model).weight_bytes - ends, Sharded(model, weights=weights).weight_bytes - ends
    assert share == pytest.approx(less / whole, rel=0.01)


def test_kv_is_two_vectors_for_each_layer_and_kv_head():
    assert 2 * 32 * 8 * 128 * 2 == Sharded(load("mistral-7b")).kv_bytes_per_token
    assert 2 * 32 * 8 * 128 == Sharded(load("mistral-7b"), kv="fp8").kv_bytes_per_token
    assert 2 * 32 * 8 * (128 + 8) == Sharded(load("mistral-7b"), kv="u8").kv_bytes_per_token
    assert 32 * 8 * (128 + 64 + 2 * 8) == Sharded(load("mistral-7b"), kv="u4").kv_bytes_per_token


def test_kv_gets_what_the_weights_leave():
    sharded = Sharded(load("llama2-7b"))
    assert int((72e9 - sharded.weight_bytes) / (2 * 32 * 4096 * 2)) == sharded.kv_tokens(80e9, 0.9)


@pytest.mark.parametrize(
    ("sharded", "says"),
    [
        (
            Sharded(load("llama2-70b")),
            "llama2-70b in fp16 at TP 1, PP 1 needs 138.0 GB.*72.0 GB: 66.0 GB too much; TP 2 or PP 2 or fp8",
        ),
        (Sharded(load("falcon-180b"), weights="int4"), "TP 2 or PP 2 would do"),
    ],
)
def test_a_model_that_does_not_fit_says_by_how_much_and_what_would_do(sharded, says):
    with pytest.raises(ValueError, match=says):
        sharded.kv_tokens(80e9)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tp": 3}, "TP 3 does not divide the 64 heads, 8 KV heads and 28672 FFN channels of llama2-70b; it could be 1, 2, 4"),
        ({"tp": 0}, "TP 0"),
        ({"pp": 81}, "PP 81 leaves stages without one of the 80 layers"),
        ({"weights": "fp4"}, "weights in 'fp4' are not known"),
        ({"kv": "int2"}, "known: bf16, fp16, fp8"),
    ],
)
def test_a_split_that_cannot_be_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Sharded(load("llama2-70b"), **options)


def test_a_name_that_is_unknown_suggests_the_nearest():
    with pytest.raises(ValueError, match="unknown model 'lama2-7b'.*did you mean 'llama2-7b'"):
        load("lama2-7b")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"hidden_size": -4096}, "'hidden_size' is -4096, expected a number above 0"),
        ({"num_hidden_layers": "32"}, "'num_hidden_layers' is '32'"),
        ({"num_key_value_heads": 5}, "32 attention heads cannot share 5 KV heads"),
        ({"num_attention_heads": 33, "num_key_value_heads": 33}, "cannot be shared by 33 heads"),
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported are llama"),
    ],
)
def test_what_is_wrong_in_a_config_is_named(tmp_path, change, says):
    with pytest.raises(ValueError, match=says):
        load(write(tmp_path, CONFIGS["llama2-7b"] | change))


@pytest.mark.parametrize("change", [{"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}])
def test_a_mixture_with_dense_layers_is_refused(tmp_path, change):
    with pytest.raises(ValueError, match="some layers have no experts"):
        load(write(tmp_path, CONFIGS["qwen3-30b-a3b"] | change))


@pytest.mark.parametrize(("text", "says"), [("{", "is not JSON"), ("[]", "is list")])
def test_a_file_that_is_no_config_is_refused(tmp_path, text, says):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        load(str(tmp_path / "config.json"))
