"""PEFT folders: what an adapter adds to its base model is read as PEFT computes it, and one that cannot be used is refused with the
reason, the place and the way out."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stallfree.checkpoint import CheckpointError, ModelConfig
from stallfree.checkpoint import adapter as module
from stallfree.checkpoint.adapter import MODULES, open_adapter
from tests.adapters import made_adapter
from tests.models import change_json

Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_"


def model(**changes: object) -> ModelConfig:
    """Two layers; every width is another one, so that no shape is right by chance."""
    sizes = {
        "family": "llama",
        "num_layers": 2,
        "hidden_size": 96,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "ffn_size": 192,
        "vocab_size": 160,
        "max_model_len": 256,
        "norm_eps": 1e-5,
        "inv_freq": (1.0,) * 16,
        "windows": (0, 0),
    }
    return ModelConfig(**{**sizes, **changes})


CONFIG = model()
SHAPES = {
    "q_proj": (128, 96),
    "k_proj": (64, 96),
    "v_proj": (64, 96),
    "o_proj": (96, 128),
    "gate_proj": (192, 96),
    "up_proj": (192, 96),
    "down_proj": (96, 192),
}


def change_tensors(folder: Path, **changes: np.ndarray | None) -> None:
    """Set tensors of layer 1's q_proj, by half, or of any name; None removes one."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, values in changes.items():
        name = Q + name + ".weight" if len(name) == 1 else name
        tensors.pop(name, None)
        if values is not None:
            tensors[name] = values
    save_file(tensors, file)


def refused(folder: Path, config: ModelConfig = CONFIG, **options: int) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_adapter(folder, config, **options)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_all_modules_are_read_in_their_shapes(tmp_path):
    adapter = open_adapter(made_adapter(tmp_path, CONFIG, MODULES, rank=5), CONFIG)
    assert (5, frozenset(MODULES)) == (adapter.rank, adapter.modules)
    pairs = {module: adapter.read(module, range(2)) for module in MODULES}
    assert {module: ((2, 5, inner), (2, out, 5)) for module, (out, inner) in SHAPES.items()} == {
        module: (a.shape, b.shape) for module, (a, b) in pairs.items()
    }


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({"lora_alpha": 4}, 0.5),
        ({"lora_alpha": 4, "use_rslora": True}, 4 / 8**0.5),
        ({"lora_alpha": 4, "alpha_pattern": {"q_proj": 16}}, 2.0),
        ({"lora_alpha": 4, "alpha_pattern": {"model.layers.1.self_attn.q_proj": 16}}, 2.0),
        ({"lora_alpha": 4, "alpha_pattern": {r"layers\.[1-9]\..*q_proj": 16}}, 2.0),
        ({"lora_alpha": 4, "alpha_pattern": {"proj": 16}}, 0.5),
        ({"lora_alpha": 4, "alpha_pattern": {"k_proj": 3, "q_proj": 16, r".*q_proj": 64}}, 2.0),
        ({"lora_alpha": 0.5, "fan_in_fan_out": True}, 0.0625),
        ({"lora_alpha": 0}, 0.0),
        ({"lora_alpha": -8}, -1.0),
    ],
)
def test_b_is_multiplied_by_its_scale(tmp_path, changes, scale):
    made_adapter(tmp_path, CONFIG, **changes)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (a,), (b,) = open_adapter(tmp_path, CONFIG).read("q_proj", range(1, 2))
    np.testing.assert_array_equal(tensors[Q + "A.weight"], a)
    np.testing.assert_allclose(b, tensors[Q + "B.weight"] * scale, rtol=1e-6)


def test_smaller_ranks_are_padded_with_zeros(tmp_path):
    made_adapter(tmp_path, CONFIG, rank=2, rank_pattern={"1.self_attn.q_proj": 6}, lora_alpha=6)
    adapter = open_adapter(tmp_path, CONFIG)
    (a, _), (b, whole) = adapter.read("q_proj", range(2))
    assert 6 == adapter.rank
    assert ((6, 96), (128, 6)) == (a.shape, b.shape)
    assert a[:2].all()
    assert b[:, :2].all()
    assert not a[2:].any()
    assert not b[:, 2:].any()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    np.testing.assert_array_equal(tensors[Q + "B.weight"], whole)


def test_layers_that_it_does_not_change_are_zero(tmp_path):
    adapter = open_adapter(made_adapter(tmp_path, CONFIG, ("down_proj",), layers_to_transform=[1]), CONFIG)
    assert frozenset({"down_proj"}) == adapter.modules
    for first, second in adapter.read("down_proj", range(2)):
        assert not first.any()
        assert second.all()


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_other_precisions_are_read_as_float32(tmp_path, kind):
    file = made_adapter(tmp_path, CONFIG) / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: values.astype(kind) for name, values in tensors.items()}, file)
    (a,), _ = open_adapter(tmp_path, CONFIG).read("q_proj", range(1, 2))
    assert np.float32 == a.dtype
    np.testing.assert_allclose(a, tensors[Q + "A.weight"], atol=1e-3)


@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        None,
        ["self_attn.q_proj", "v_proj"],
        r".*\.(q|v)_proj",
        ["q_proj", "v_proj", "c_attn"],
    ],
)
def test_modules_may_be_named_in_any_of_peft_s_ways(tmp_path, targets):
    made_adapter(tmp_path, CONFIG, target_modules=targets)
    assert frozenset({"q_proj", "v_proj"}) == open_adapter(tmp_path, CONFIG).modules


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', only LORA is supported; merge it"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_dora": True}, "use_dora is True, DoRA also scales"),
        ({"bias": "lora_only"}, "bias is 'lora_only', biases are not supported"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head'], whole matrices are not supported; merge it"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices is [5]"),
        ({"alora_invocation_tokens": [5]}, "an activated LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "save it with path_initial_model_for_weight_conversion"),
        ({"r": 0}, "r is 0, expected a whole number above 0"),
        ({"r": None}, "r is None"),
        ({"r": 8.0}, "r is 8.0"),
        ({"lora_alpha": "16"}, "lora_alpha is '16', expected a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, expected a number"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is ['q_proj'], expected an object of numbers"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern is {'q_proj': '8'}"),
        ({"alpha_pattern": {"(": 8}}, "not a regular expression"),
        ({"target_modules": "("}, "target_modules is '(', not a regular expression"),
        ({"target_modules": [3]}, "target_modules is [3]"),
        ({"layers_to_transform": "1"}, "layers_to_transform is '1'"),
        ({"r": 16}, "model.layers.0.self_attn.q_proj has rank 8, adapter_config.json says 16"),
        ({"rank_pattern": {"1.self_attn.v_proj": 4}}, "model.layers.1.self_attn.v_proj has rank 8, adapter_config.json says 4"),
        ({"target_modules": ["q_proj"]}, "v_proj has weights, but adapter_config.json leaves it out"),
        ({"exclude_modules": ["v_proj"]}, "v_proj has weights, but adapter_config.json leaves it out"),
        ({"target_modules": r".*k_proj"}, "q_proj has weights"),
        ({"layers_to_transform": 0}, "layers.1.self_attn.q_proj has weights"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused_with_its_value(tmp_path, changes, message):
    made_adapter(tmp_path, CONFIG)
    change_json(tmp_path / "adapter_config.json", **changes)
    assert message in refused(tmp_path)


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"B": None}, "layers.1.self_attn.q_proj lacks lora_B; the file is incomplete"),
        ({"A": None}, "layers.1.self_attn.q_proj lacks lora_A"),
        ({"A": ones(8, 64)}, "has A [8, 64] and B [128, 8], the model needs [rank, 96] and [128, rank]; the adapter"),
        ({"B": ones(96, 8)}, "B [96, 8]"),
        ({"B": ones(128, 4)}, "A [8, 96] and B [128, 4]"),
        ({"A": ones(8)}, "A [8] and B"),
        ({"A": ones(0, 96), "B": ones(128, 0)}, "has rank 0, allowed are 1 to 256"),
        ({"A": ones(257, 96), "B": ones(128, 257)}, "has rank 257, allowed are 1 to 256; allow more"),
        ({"A": np.ones((8, 96), np.int8)}, "is I8; supported are F64, F32, F16, BF16"),
        ({Q.replace("layers.1", "layers.2") + "A.weight": ones(8, 96)}, "is for layer 2, the model has layers 0 to 1"),
        ({Q.replace("layers.1", "layers.01") + "A.weight": ones(8, 96)}, "is not A or B of a module"),
        ({Q.replace("q_proj", "qkv_proj") + "A.weight": ones(8, 96)}, "an adapter of a llama model can change (q_proj, k_proj"),
        ({Q.replace("self_attn", "mlp") + "A.weight": ones(8, 96)}, "is not A or B of a module"),
        ({"base_model.model.lm_head.lora_A.weight": ones(8, 96)}, "'base_model.model.lm_head.lora_A.weight' is not A or B"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": ones(8, 160)}, "lora_embedding_A' is not A or B"),
        ({Q + "magnitude_vector.weight": ones(128)}, "lora_magnitude_vector.weight' is not A or B"),
        ({Q.removeprefix("base_model.model.") + "A.weight": ones(8, 96)}, "is not A or B"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, changes, message):
    change_tensors(made_adapter(tmp_path, CONFIG), **changes)
    assert message in refused(tmp_path)


def test_the_largest_rank_can_be_lowered(tmp_path):
    made_adapter(tmp_path, CONFIG, rank=9)
    assert "rank 9, allowed are 1 to 8" in refused(tmp_path, max_rank=8)


@pytest.mark.parametrize(("half", "value"), [("A", np.nan), ("B", np.inf)])
def test_weights_that_are_not_finite_are_found_when_they_are_read(tmp_path, half, value):
    made_adapter(tmp_path, CONFIG)
    values = load_file(tmp_path / "adapter_model.safetensors")[Q + half + ".weight"]
    values[3, 3] = value
    change_tensors(tmp_path, **{half: values})
    adapter = open_adapter(tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match=f"q_proj.lora_{half}.weight'.* holds NaN or infinity"):
        adapter.check()


def test_a_scale_that_makes_weights_infinite_is_found(tmp_path):
    adapter = open_adapter(made_adapter(tmp_path, CONFIG, lora_alpha=1e41), CONFIG)
    with pytest.raises(CheckpointError, match="times its scale 1.25e"):
        adapter.check()


def test_a_file_that_was_replaced_after_opening_is_refused(tmp_path):
    adapter = open_adapter(made_adapter(tmp_path, CONFIG), CONFIG)
    made_adapter(tmp_path, CONFIG, ("q_proj", "k_proj"), rank=3)
    with pytest.raises(CheckpointError, match="changed after it was opened; load the adapter again"):
        adapter.read("q_proj", range(2))


def test_its_parts_are_all_of_it_in_pieces_of_a_bounded_size(tmp_path, monkeypatch):
    adapter = open_adapter(made_adapter(tmp_path, CONFIG, ("down_proj", "q_proj")), CONFIG)
    assert [("q_proj", range(2)), ("down_proj", range(2))] == list(adapter.parts())
    monkeypatch.setattr(module, "PART", 4 * 8 * 192)
    assert [(name, range(i, i + 1)) for name in ("q_proj", "down_proj") for i in range(2)] == list(adapter.parts())
    for name in ("q_proj", "down_proj"):
        whole = adapter.read(name, range(2))
        single = [adapter.read(name, range(i, i + 1)) for i in range(2)]
        for number, half in enumerate(whole):
            np.testing.assert_array_equal(half, np.concatenate([pair[number] for pair in single]))


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    assert "adapter_config.json: missing" in refused(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '"LORA"', "\xff"])
def test_a_configuration_that_is_no_json_object_is_refused(tmp_path, text):
    made_adapter(tmp_path, CONFIG)
    (tmp_path / "adapter_config.json").write_bytes(text.encode("latin-1"))
    assert "JSON" in refused(tmp_path)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path):
    made_adapter(tmp_path, CONFIG)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    assert "only adapter_model.bin, and pickled weights are never loaded" in refused(tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    assert "adapter_model.safetensors: missing; the adapter is incomplete" in refused(tmp_path)


def test_a_damaged_or_truncated_file_is_refused(tmp_path):
    file = made_adapter(tmp_path, CONFIG) / "adapter_model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", b"\xff" * 64, whole[:8] + b"[" + whole[9:]):
        file.write_bytes(damaged)
        assert "fetch it again" in refused(tmp_path)


def test_a_file_without_tensors_is_refused(tmp_path):
    save_file({}, made_adapter(tmp_path, CONFIG) / "adapter_model.safetensors")
    assert "no tensors" in refused(tmp_path)


def test_links_are_followed_as_a_hub_s_cache_needs_it(tmp_path):
    made_adapter(tmp_path / "blobs", CONFIG)
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert 8 == open_adapter(tmp_path / "snapshot", CONFIG).rank


def test_a_family_without_these_modules_is_refused(tmp_path):
    assert "the family falcon cannot have adapters" in refused(tmp_path, model(family="falcon"))


def test_a_mixture_of_experts_has_adapters_on_attention_only(tmp_path):
    mixtral = model(family="mixtral", experts=2, active_experts=1)
    assert 8 == open_adapter(made_adapter(tmp_path, mixtral), mixtral).rank
    made_adapter(tmp_path, CONFIG, ("up_proj",))
    assert "of a mixtral model can change (q_proj, k_proj, v_proj, o_proj)" in refused(tmp_path, mixtral)


def test_an_open_adapter_is_small_and_quickly_opened(tmp_path):
    """Ten thousand adapters of a 30-layer model: 70 MB, and seconds. The limit here is for a machine that is ten times slower."""
    config = model(num_layers=30, windows=(0,) * 30)
    made_adapter(tmp_path, config, MODULES[:4])
    open_adapter(tmp_path, config)
    started = time.perf_counter()
    adapters = [open_adapter(tmp_path, config) for _ in range(100)]
    assert time.perf_counter() - started < 100 * 0.02
    assert adapters[0].pairs.nbytes < 8000


def test_the_configuration_is_what_peft_writes(tmp_path):
    """Keys that say nothing about the result are ignored, also those that are not known yet."""
    made_adapter(tmp_path, CONFIG, revision="main", auto_mapping={"a": 1}, loftq_config={}, megatron_core="megatron.core", new={})
    assert 8 == open_adapter(tmp_path, CONFIG).rank
    assert "a/base" in json.loads((tmp_path / "adapter_config.json").read_text()).values()
