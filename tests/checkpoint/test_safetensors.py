"""Hugging Face folders: config and tensors are read, and a folder that cannot be used is refused with the reason."""

import json
from pathlib import Path

import numpy as np
import pytest

from stallfree.checkpoint import CheckpointError, open_checkpoint
from stallfree.checkpoint.config import rotary_frequencies
from stallfree.checkpoint.identity import identity
from tests.models import TINY, change_json

CONFIG = {
    **TINY,
    "model_type": "llama",
    "hidden_act": "silu",
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
    "num_hidden_layers": 2,
}


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(len(name)).normal(size=shape).astype(np.float32)


def write(path: Path, tensors: dict[str, tuple[int, ...]], kind: str = "F32") -> None:
    """Write a safetensors file of random numbers."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, shape in tensors.items():
        data = values(name, shape)
        data = (data.view(np.uint32) >> 16).astype(np.uint16) if kind == "BF16" else data.astype({"F16": "<f2"}.get(kind, "<f4"))
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(body), len(body) + data.nbytes]}
        body += data.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes((0).to_bytes(8, "little"))
    hidden, ffn = 96, 192
    shapes = {"model.embed_tokens.weight": (160, hidden), "model.norm.weight": (hidden,)}
    for layer in range(2):
        p = f"model.layers.{layer}."
        shapes |= {p + "self_attn.q_proj.weight": (128, hidden), p + "self_attn.k_proj.weight": (64, hidden)}
        shapes |= {p + "self_attn.v_proj.weight": (64, hidden), p + "self_attn.o_proj.weight": (hidden, 128)}
        shapes |= {p + "mlp.gate_proj.weight": (ffn, hidden), p + "mlp.up_proj.weight": (ffn, hidden)}
        shapes |= {p + "mlp.down_proj.weight": (hidden, ffn)}
        shapes |= {p + "input_layernorm.weight": (hidden,), p + "post_attention_layernorm.weight": (hidden,)}
    write(tmp_path / "model.safetensors", shapes)
    return tmp_path


def refused(folder: Path, **changes: object) -> str:
    """The text of the refusal after these changes of config.json; it always names the folder."""
    if changes:
        change_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_the_config_is_read(folder: Path) -> None:
    config = open_checkpoint(folder).config
    assert ("llama", 160, 2, 96, 4, 2, 32, 192) == (
        config.family, config.vocab_size, config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads,
        config.head_dim, config.ffn_size,
    )  # fmt: skip
    assert (1, (2,), True, (0, 0)) == (config.bos_token_id, config.eos_token_ids, config.tie_embeddings, config.windows)


def test_tensors_of_several_files_are_found(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    shapes = checkpoint.config.tensors()
    names = sorted(shapes)
    (folder / "model.safetensors").unlink()
    write(folder / "model-00001-of-00002.safetensors", {n: shapes[n] for n in names[:7]})
    write(folder / "model-00002-of-00002.safetensors", {n: shapes[n] for n in names[7:]})
    for name in names:
        np.testing.assert_array_equal(values(name, shapes[name]), open_checkpoint(folder).read(name))


def test_a_folder_may_have_a_relative_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = open_checkpoint(folder).read("model.norm.weight")
    monkeypatch.chdir(folder.parent)
    np.testing.assert_array_equal(expected, open_checkpoint(Path(folder.name)).read("model.norm.weight"))


@pytest.mark.parametrize(("kind", "bound"), [("F16", 0.002), ("BF16", 0.02)])
def test_half_precision_is_read_as_float32(folder: Path, kind: str, bound: float) -> None:
    shapes = open_checkpoint(folder).config.tensors()
    write(folder / "model.safetensors", shapes, kind)
    norm = open_checkpoint(folder).read("model.norm.weight")
    assert norm.dtype == np.float32
    np.testing.assert_allclose(norm, values("model.norm.weight", (96,)), rtol=0, atol=bound)


def test_generation_config_says_which_tokens_end_a_reply(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert (2, 7) == open_checkpoint(folder).config.eos_token_ids


def test_qwen_has_no_window_unless_it_says_so(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "model_type": "qwen3", "sliding_window": 16}))
    assert "q_norm" in refused(folder)  # a qwen3 has tensors that this folder lacks
    from stallfree.checkpoint.safetensors import _config

    assert (0, 0) == _config(folder).windows
    change_json(folder / "config.json", use_sliding_window=True, max_window_layers=1)
    assert (0, 16) == _config(folder).windows


def test_old_and_new_names_of_the_rotary_base_agree(folder: Path) -> None:
    change_json(folder / "config.json", rope_theta=None, rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    assert rotary_frequencies(32, 5e5, {}, "test") == open_checkpoint(folder).config.inv_freq
    change_json(folder / "config.json", rope_theta=5e5, rope_parameters=None)
    assert rotary_frequencies(32, 5e5, {}, "test") == open_checkpoint(folder).config.inv_freq


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert "config.json: missing" in refused(tmp_path)


def test_broken_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "not valid JSON" in refused(folder)


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "rms_norm_eps"])
def test_a_missing_key_is_named(folder: Path, key: str) -> None:
    assert f"{key!r} is missing" in refused(folder, **{key: None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported are llama, mistral, qwen2, qwen3"),
        ({"hidden_size": "96"}, "'hidden_size' is '96'"),
        ({"hidden_size": 2**40}, "'hidden_size' is 1099511627776"),
        ({"num_hidden_layers": -1}, "'num_hidden_layers' is -1"),
        ({"num_hidden_layers": 3}, "tensors are missing: 'model.layers.2.self_attn.q_proj.weight'"),
        ({"intermediate_size": 100}, "has shape (192, 96)"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_key_value_heads": 3}, "cannot share 3 KV heads"),
        ({"eos_token_id": 160}, "special token 160"),
        ({"tie_word_embeddings": False}, "'lm_head.weight' is missing"),
        ({"rope_scaling": {"rope_type": "mrope", "factor": 4.0}}, "rope scaling 'mrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'factor' is missing"),
        ({"rope_scaling": 3}, "rope scaling is 3"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by quant_method 'gptq'"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    assert message in refused(folder, **changes)


def test_tensors_that_nobody_would_read_are_named(folder: Path) -> None:
    shapes = open_checkpoint(folder).config.tensors()
    harmless = {"model.layers.0.self_attn.rotary_emb.inv_freq": (16,), "lm_head.weight": (160, 96)}
    write(folder / "model.safetensors", shapes | harmless)
    assert shapes == open_checkpoint(folder).config.tensors()
    write(folder / "model.safetensors", shapes | {"model.layers.1.self_attn.q_proj.bias": (128,)})
    assert "a llama model does not have: 'model.layers.1.self_attn.q_proj.bias'" in refused(folder)


FALCON = {"model_type": "falcon", "bos_token_id": 1, "eos_token_id": 2, "new_decoder_architecture": True, "num_kv_heads": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alibi": True}, "alibi positions"),
        ({"new_decoder_architecture": False, "parallel_attn": False}, "parallel_attn false"),
        ({"activation": "relu"}, "activation 'relu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by quant_method 'gptq'"),
        ({"rope_scaling": 3}, "rope scaling is 3"),
        ({}, "tensors are missing: 'transformer.word_embeddings.weight'"),
    ],
)
def test_a_falcon_that_cannot_be_used_is_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    assert message in refused(folder, **{**FALCON, **changes})


def test_pickled_weights_are_never_loaded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "only pytorch_model.bin, and pickled weights are never loaded" in refused(folder)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "truncated" in refused(folder)


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 64, (2).to_bytes(8, "little") + b"{]", (2).to_bytes(8, "little") + b"[]"]
)
def test_something_else_is_not_a_safetensors_file(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert "safetensors" in refused(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [96], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-96], "data_offsets": [0, -384]},
        {"dtype": "F32", "shape": [96], "data_offsets": [10**12, 10**12 + 384]},
        {"dtype": "F32", "shape": [96]},
        {"dtype": "F32", "shape": 96, "data_offsets": [0, 384]},
        7,
    ],
)
def test_a_damaged_header_is_refused(folder: Path, entry: object) -> None:
    text = json.dumps({"model.norm.weight": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(1000))
    refused(folder)


INDEX = "model.safetensors.index.json"


def parts(folder: Path, wanted: object = None) -> dict[str, tuple[int, ...]]:
    """Write the model's tensors into two numbered files with an index, and return their shapes."""
    shapes = open_checkpoint(folder).config.tensors()
    (folder / "model.safetensors").unlink()
    names = sorted(shapes)
    weight_map = {}
    for number, some in enumerate((names[:7], names[7:]), 1):
        write(folder / f"model-0000{number}-of-00002.safetensors", {n: shapes[n] for n in some})
        weight_map |= dict.fromkeys(some, f"model-0000{number}-of-00002.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map} if wanted is None else wanted))
    return shapes


@pytest.mark.parametrize(
    "name",
    [
        "consolidated.safetensors",
        "consolidated-00001-of-00002.safetensors",
        "adapter_model.safetensors",
        "model.safetensors",
        "model-00001-of-00003.safetensors",
        "optimizer.safetensors",
    ],
)
def test_the_index_says_which_files_count(folder: Path, name: str) -> None:
    shapes = parts(folder)
    (folder / name).write_bytes(b"is not read")
    checkpoint = open_checkpoint(folder)
    assert ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] == [f.name for f in checkpoint.files]
    for tensor, shape in shapes.items():
        np.testing.assert_array_equal(values(tensor, shape), checkpoint.read(tensor))
    before = identity(checkpoint)
    (folder / name).write_bytes(b"something else")
    assert before == identity(open_checkpoint(folder))


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors", "model-00001-of-00002.safetensors"])
def test_without_an_index_the_whole_model_counts(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"is not read")
    assert ["model.safetensors"] == [file.name for file in open_checkpoint(folder).files]


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors"])
def test_without_an_index_numbered_parts_count(folder: Path, name: str) -> None:
    parts(folder)
    (folder / INDEX).unlink()
    (folder / name).write_bytes(b"is not read")
    assert 2 == len(open_checkpoint(folder).files)


def test_where_two_files_have_a_tensor_the_index_says_whose_it_is(folder: Path) -> None:
    shapes = parts(folder)
    name = sorted(shapes)[0]
    other = {n: shapes[n] for n in [*sorted(shapes)[7:], name]}
    write(folder / "model-00002-of-00002.safetensors", other)
    file = open_checkpoint(folder).read.args[1].args[0][name][0]
    assert "model-00001-of-00002.safetensors" == Path(file).name


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors"])
def test_a_folder_without_a_model_names_what_it_has(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    assert f"only {name}, which holds no whole model" in refused(folder)


def test_a_file_that_the_index_names_and_that_is_not_there_is_named(folder: Path) -> None:
    parts(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "names model-00002-of-00002.safetensors, which is not there" in refused(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "'weight_map' is no object"),
        ('{"weight_map": {}}', "'weight_map' is no object"),
        ('{"weight_map": ["model.safetensors"]}', "'weight_map' is no object"),
        ('{"weight_map": {"model.norm.weight": 7}}', "'weight_map' is no object"),
        ('{"weight_map": {"a": "../elsewhere.safetensors"}}', "'../elsewhere.safetensors' is no safetensors file of the folder"),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', "'/etc/x.safetensors' is no safetensors file of the folder"),
        ('{"weight_map": {"a": "x/../../y.safetensors"}}', "is no safetensors file of the folder"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "'pytorch_model.bin' is no safetensors file"),
    ],
)
def test_an_index_that_cannot_be_used_is_named(folder: Path, content: str, message: str) -> None:
    (folder / INDEX).write_text(content)
    error = refused(folder)
    assert INDEX in error
    assert message in error


def test_an_index_may_name_files_in_folders_below(folder: Path) -> None:
    shapes = open_checkpoint(folder).config.tensors()
    (folder / "weights").mkdir()
    (folder / "model.safetensors").rename(folder / "weights" / "all.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(shapes, "weights/all.safetensors")}))
    assert [folder / "weights" / "all.safetensors"] == list(open_checkpoint(folder).files)


FACTORS = [1.0 + i / 7 for i in range(16)]
LONG = [2.0 + i for i in range(16)]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("base", [1e4, 5e5])
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"type": "linear", "factor": 2.5},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 128},
        YARN,
        {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
        YARN | {"beta_fast": 16, "beta_slow": 2},
        YARN | {"attention_factor": 0.7},
        YARN | {"mscale": 0.9, "mscale_all_dim": 0.4},
        YARN | {"mscale": 1.0},
        YARN | {"truncate": False},
        YARN | {"factor": 1.0},
        YARN | {"beta_fast": 1, "beta_slow": 1},
        {"rope_type": "yarn", "factor": 2.0},
        {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": LONG, "original_max_position_embeddings": 64},
        {
            "rope_type": "longrope", "short_factor": FACTORS, "long_factor": LONG, "factor": 16.0,
            "original_max_position_embeddings": 128,
        },
        {
            "rope_type": "longrope", "short_factor": FACTORS, "long_factor": LONG, "attention_factor": 1.3,
            "original_max_position_embeddings": 64,
        },
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)  # fmt: skip
def test_scaled_positions_are_those_of_transformers(folder: Path, scaling: dict[str, object], base: float) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns of its own deprecations while it is imported
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    change_json(folder / "config.json", rope_scaling=scaling, rope_theta=base)
    config = open_checkpoint(folder).config
    reference = LlamaConfig(**{**TINY, "rope_parameters": {**scaling, "rope_theta": base}})
    kind = scaling.get("rope_type", scaling.get("type"))
    compute = {"default": LlamaRotaryEmbedding.compute_default_rope_parameters, **ROPE_INIT_FUNCTIONS}[kind]
    frequencies, factor = compute(reference, seq_len=config.max_model_len)
    np.testing.assert_allclose(config.inv_freq, frequencies.numpy(), rtol=2e-6)
    assert factor == pytest.approx(config.rope_scale)


def test_how_far_scaled_positions_reach(folder: Path) -> None:
    def limit(**scaling: object) -> int:
        change_json(folder / "config.json", rope_scaling=scaling)
        return open_checkpoint(folder).config.max_model_len

    longrope = {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": LONG}
    assert 256 == limit(rope_type="dynamic", factor=4.0)
    assert 64 == limit(**longrope, original_max_position_embeddings=64)
    assert 256 == limit(**YARN)
    assert 1024 == limit(rope_type="yarn", factor=4.0)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "klingon"}, "rope scaling 'klingon' is not supported; known are default, linear, llama3, yarn"),
        ({"rope_type": "dynamic", "factor": "two"}, "'factor' is 'two'"),
        ({"rope_type": "yarn", "factor": -1}, "'factor' is -1"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": "x"}, "'beta_fast' is 'x'"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}, "'original_max_position_embeddings' is 0"),
        ({"rope_type": "yarn", "factor": 2.0, "attention_factor": "x"}, "'attention_factor' is 'x'"),
        ({"rope_type": "longrope", "factor": 2.0}, "needs 'short_factor', a list of 16 numbers"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 15}, "needs 'short_factor', a list of 16 numbers"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 15 + [0]}, "'short_factor' is 0"),
    ],
)
def test_scaling_that_cannot_be_computed_is_named(folder: Path, scaling: dict[str, object], message: str) -> None:
    assert message in refused(folder, rope_scaling=scaling)
