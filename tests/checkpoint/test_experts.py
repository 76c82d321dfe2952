"""Mixtures of experts: single experts are taken out of the tensors that hold all of them, in each format; others are refused."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from stallfree.checkpoint import CheckpointError, open_checkpoint
from tests.checkpoint.test_safetensors import refused
from tests.executors.test_openvino import EXPERTS, GPT_OSS
from tests.models import TINY, change_json, write_folder, write_gguf

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

SHAPES = {"gate_up_proj": (384, 96), "down_proj": (96, 192)}
"""[out, in] of the matrices of an expert in a folder of gpt-oss."""
FIRST = "model.layers.0.mlp.experts"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    write_folder(tmp_path / "plain", "gpt_oss", **GPT_OSS, num_hidden_layers=1)
    return tmp_path / "plain"


@pytest.fixture
def packed(plain: Path) -> Path:
    """The same model with experts of random MXFP4."""
    from safetensors.numpy import load_file, save_file

    tensors, random = load_file(plain / "model.safetensors"), np.random.default_rng(5)
    for name, (out, inner) in SHAPES.items():
        del tensors[f"{FIRST}.{name}"]
        tensors[f"{FIRST}.{name}_blocks"] = random.integers(0, 256, (4, out, inner // 32, 16), np.uint8)
        tensors[f"{FIRST}.{name}_scales"] = random.integers(118, 130, (4, out, inner // 32), np.uint8)
    save_file(tensors, plain / "model.safetensors")
    change_json(plain / "config.json", quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return plain


def tensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def test_gate_and_up_alternate_in_a_folder_of_gpt_oss(plain: Path) -> None:
    stored, checkpoint = tensors(plain), open_checkpoint(plain)
    for place, name in ((0, "gate_proj"), (1, "up_proj")):
        of_file = stored[f"{FIRST}.gate_up_proj"][2][:, place::2].T
        np.testing.assert_array_equal(of_file, checkpoint.read(f"{FIRST}.2.{name}.weight"))
        np.testing.assert_array_equal(stored[f"{FIRST}.gate_up_proj_bias"][2][place::2], checkpoint.read(f"{FIRST}.2.{name}.bias"))
    np.testing.assert_array_equal(stored[f"{FIRST}.down_proj"][3].T, checkpoint.read(f"{FIRST}.3.down_proj.weight"))
    np.testing.assert_array_equal(stored[f"{FIRST}.down_proj_bias"][3], checkpoint.read(f"{FIRST}.3.down_proj.bias"))


def test_mxfp4_stands_for_the_numbers_that_transformers_makes_of_it(packed: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns of its own deprecations while it is imported
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors
    stored, checkpoint = tensors(packed), open_checkpoint(packed)
    both, down = (
        convert_moe_packed_tensors(
            *(torch.from_numpy(stored[f"{FIRST}.{name}_{end}"]) for end in ("blocks", "scales")), dtype=torch.float32
        ).numpy()
        for name in SHAPES
    )
    for expert in range(4):
        np.testing.assert_array_equal(both[expert][:, 0::2].T, checkpoint.read(f"{FIRST}.{expert}.gate_proj.weight"))
        np.testing.assert_array_equal(both[expert][:, 1::2].T, checkpoint.read(f"{FIRST}.{expert}.up_proj.weight"))
        np.testing.assert_array_equal(down[expert].T, checkpoint.read(f"{FIRST}.{expert}.down_proj.weight"))


@pytest.mark.parametrize(("kind", "bound"), [("F16", 0.002), ("Q8_0", 0.02), ("MXFP4", 0.3)])
def test_experts_of_a_quantised_gguf_file_come_back_under_their_names(tmp_path: Path, kind: str, bound: float) -> None:
    write_folder(tmp_path / "folder", "qwen3_moe", **EXPERTS, num_hidden_layers=1)
    folder = open_checkpoint(tmp_path / "folder")
    write_gguf(tmp_path / "model.gguf", folder, kind)
    file = open_checkpoint(tmp_path / "model.gguf")
    assert folder.config.tensors() == file.config.tensors()
    for name in folder.config.tensors():
        np.testing.assert_allclose(file.read(name), folder.read(name), rtol=0, atol=bound)


def test_a_mixtral_of_a_gguf_file_is_a_mixtral(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", "mixtral", num_local_experts=3, sliding_window=None)
    write_gguf(tmp_path / "model.gguf", open_checkpoint(tmp_path / "folder"))
    config = open_checkpoint(tmp_path / "model.gguf").config
    assert ("mixtral", 3, 2, 192) == (config.family, config.experts, config.active_experts, config.ffn_size)


def test_the_first_layer_of_gpt_oss_has_a_window_and_the_second_has_none(plain: Path) -> None:
    change_json(plain / "config.json", layer_types=None, num_hidden_layers=4)
    from stallfree.checkpoint.safetensors import _config

    assert (20, 0, 20, 0) == _config(plain).windows
    change_json(plain / "config.json", layer_types=["full_attention"] * 3 + ["sliding_attention"])
    assert (0, 0, 0, 20) == _config(plain).windows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_local_experts": 5}, "a tensor of 5 experts cannot have shape (4, "),
        ({"num_experts_per_tok": 5}, "a token cannot pass 5 of 4 experts"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"swiglu_limit": -1}, "'swiglu_limit' is -1"),
    ],
)
def test_a_gpt_oss_that_cannot_be_used_is_refused(plain: Path, changes: dict[str, object], message: str) -> None:
    assert message in refused(plain, **changes)


def test_damaged_mxfp4_is_refused(packed: Path) -> None:
    from safetensors.numpy import save_file

    stored = tensors(packed)
    name = f"{FIRST}.down_proj_scales"
    save_file(stored | {name: stored[name][:, :-1]}, packed / "model.safetensors")
    assert "down_proj_scales do not fit the blocks" in refused(packed)
    save_file(stored | {name: stored[name].astype(np.float32)}, packed / "model.safetensors")
    with pytest.raises(CheckpointError, match="MXFP4 experts are F32, expected U8"):
        open_checkpoint(packed).read(f"{FIRST}.0.down_proj.weight")
    del stored[name]
    save_file(stored, packed / "model.safetensors")
    assert f"tensors are missing: '{FIRST}.0.down_proj.weight'" in refused(packed)


def test_mxfp4_is_for_experts_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(TINY | {"model_type": "llama", "quantization_config": {"quant_method": "mxfp4"}})
    )
    (tmp_path / "model.safetensors").write_bytes((0).to_bytes(8, "little"))
    assert "quantised by" in refused(tmp_path)


@pytest.mark.parametrize("changes", [{"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}])
def test_a_qwen_with_dense_layers_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    write_folder(tmp_path, "qwen3_moe", **EXPERTS, num_hidden_layers=1)
    assert "some layers have no experts; only models with experts in every layer are supported" in refused(tmp_path, **changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"expert_count": 6}, "'blk.0.ffn_gate_exps.weight' has shape (5, 64, 96), the configuration says 6 experts"),
        ({"expert_used_count": 6}, "a token cannot pass 6 of 5 experts"),
        ({"expert_used_count": None}, "'qwen3moe.expert_used_count' is missing"),
        ({"expert_count": None}, "architecture 'qwen3moe' is not supported"),
    ],
)
def test_a_gguf_file_with_experts_that_cannot_be_used_is_refused(tmp_path: Path, values: dict, message: str) -> None:
    write_folder(tmp_path / "folder", "qwen3_moe", **EXPERTS, num_hidden_layers=1)
    write_gguf(tmp_path / "model.gguf", open_checkpoint(tmp_path / "folder"), **values)
    assert message in refused(tmp_path / "model.gguf")


def test_blocks_of_mxfp4_stand_for_the_same_numbers(packed: Path, tmp_path: Path) -> None:
    folder = open_checkpoint(packed)
    name = f"{FIRST}.1.up_proj.weight"
    assert ("e2m1", 32) == (folder.codes[name], folder.blocks(name).group)
    np.testing.assert_array_equal(folder.read(name), folder.blocks(name).dense())
    write_folder(tmp_path / "folder", "qwen3_moe", **EXPERTS, num_hidden_layers=1)
    write_gguf(tmp_path / "model.gguf", open_checkpoint(tmp_path / "folder"), "MXFP4")
    file = open_checkpoint(tmp_path / "model.gguf")
    assert file.config.tensors()[name] == file.blocks(name).shape
    np.testing.assert_array_equal(file.read(name), file.blocks(name).dense())
