"""Matrices of four bits as other tools pack them are read as they were; what is not known is refused by name."""

import numpy as np
import pytest

from stallfree.checkpoint import CheckpointError, open_checkpoint
from stallfree.checkpoint.identity import identity
from stallfree.checkpoint.packing import Packing
from tests.checkpoint.packing import CONFIGS, GROUP, SCHEME, numbers, pack_folder, stored
from tests.models import change_json, write_folder

OUT, INNER = 24, 128
SYMMETRIC = CONFIGS["compressed-tensors"] | {"config_groups": {"group_0": {"weights": SCHEME | {"symmetric": True}}}}


@pytest.fixture
def parts():
    """Codes [out, in], scales and zeros [out, groups]."""
    draw = np.random.default_rng(1)
    codes = draw.integers(0, 16, (OUT, INNER), np.uint8)
    scales = draw.uniform(0.01, 0.1, (OUT, INNER // GROUP)).astype(np.float32)
    return codes, scales, draw.integers(1, 16, scales.shape, np.uint8)


def named(tensors):
    return {f"m.{end}": value for end, value in tensors.items()}


@pytest.mark.parametrize("values", [*CONFIGS.values(), SYMMETRIC], ids=[*CONFIGS, "symmetric"])
def test_what_was_packed_is_read(values, parts):
    codes, scales, zeros = parts
    if values is SYMMETRIC:
        zeros = np.full_like(zeros, 8)
    tensors = named(stored(values["quant_method"], codes, scales, zeros))
    packing = Packing.of(values, "config.json")
    assert packing.matrices({name: value.shape for name, value in tensors.items()}) == {"m.weight": (OUT, INNER)}
    wanted = numbers(codes, scales, zeros)
    of = tensors.__getitem__, tensors, "m.weight", (OUT, INNER), "here"
    np.testing.assert_allclose(packing.dense(*of), wanted, rtol=1e-6)
    assert packing.side_by_side(*of[:-1])
    np.testing.assert_allclose(packing.blocks(*of).dense(), wanted, rtol=1e-6)


def test_gptq_may_have_the_inputs_of_a_group_anywhere(parts):
    groups = np.random.default_rng(2).permutation(np.arange(INNER) // GROUP)
    tensors = named(stored("gptq", *parts)) | {"m.g_idx": groups.astype(np.int32)}
    of = tensors.__getitem__, tensors, "m.weight", (OUT, INNER), "here"
    packing = Packing.of(CONFIGS["gptq"] | {"desc_act": True}, "config.json")
    np.testing.assert_allclose(packing.dense(*of), numbers(*parts, groups), rtol=1e-6)
    assert not packing.side_by_side(*of[:-1])


@pytest.mark.parametrize(
    "values",
    [
        CONFIGS["awq"] | {"version": "gemv"},
        CONFIGS["awq"] | {"bits": 8},
        CONFIGS["gptq"] | {"checkpoint_format": "marlin"},
        CONFIGS["gptq"] | {"bits": 3},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "fp8"},
        SYMMETRIC | {"format": "float-quantized"},
        SYMMETRIC | {"config_groups": {}},
        SYMMETRIC | {"config_groups": {"group_0": {"weights": SCHEME | {"num_bits": 8}}}},
        SYMMETRIC | {"config_groups": {"group_0": {"weights": SCHEME, "input_activations": {"num_bits": 8}}}},
        {"bits": 4},
        "awq",
    ],
    ids=str,
)
def test_another_way_of_packing_is_refused_with_what_is_known(values):
    with pytest.raises(CheckpointError, match=r"supported|expected an object"):
        Packing.of(values, "config.json")


@pytest.mark.parametrize("broken", ["scales", "qzeros", "qweight", "g_idx"])
def test_parts_that_do_not_fit_are_named(broken, parts):
    tensors = named(stored("gptq", *parts)) | {"m.g_idx": np.arange(INNER, dtype=np.int32) // GROUP}
    tensors[f"m.{broken}"] = tensors[f"m.{broken}"][:1]
    of = tensors.__getitem__, tensors, "m.weight", (OUT, INNER), "here"
    with pytest.raises(CheckpointError, match=r"here: the parts of packed 'm\.weight' do not fit together"):
        Packing.of(CONFIGS["gptq"], "config.json").dense(*of)


@pytest.fixture(scope="module", params=["llama", "phi3"])
def plain(request, tmp_path_factory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp(request.param)
    write_folder(folder, request.param)
    return folder


@pytest.mark.parametrize("method", CONFIGS)
def test_a_packed_folder_is_the_model_with_rounded_weights(plain, method, tmp_path):
    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    dense = pack_folder(tmp_path, method)
    checkpoint, before = open_checkpoint(tmp_path), open_checkpoint(plain)
    assert checkpoint.config == before.config
    assert set(checkpoint.codes.values()) == {"int4"}
    read = {name: checkpoint.read(name) for name in checkpoint.config.tensors()}
    for name, values in read.items():
        if name in checkpoint.codes:
            np.testing.assert_allclose(checkpoint.blocks(name).dense(), values, rtol=1e-5, atol=1e-7)
            assert not np.array_equal(values, before.read(name))
        else:
            assert np.array_equal(values, before.read(name))
    layer = "model.layers.1.mlp."
    fused = np.concatenate([read[f"{layer}gate_proj.weight"], read[f"{layer}up_proj.weight"]])
    wanted = dense.get(f"{layer}gate_up_proj.weight")
    if wanted is None:
        wanted = np.concatenate([dense[f"{layer}gate_proj.weight"], dense[f"{layer}up_proj.weight"]])
    np.testing.assert_allclose(fused, wanted, rtol=1e-6)


def test_a_bias_of_zeros_that_the_model_does_not_have_is_left_out(plain, tmp_path):
    from safetensors.numpy import load_file, save_file

    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    pack_folder(tmp_path, "gptq")
    tensors, name = load_file(tmp_path / "model.safetensors"), "model.layers.0.mlp.down_proj.bias"
    save_file(tensors | {name: np.zeros(96, np.float32)}, tmp_path / "model.safetensors")
    open_checkpoint(tmp_path)
    save_file(tensors | {name: np.ones(96, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"does not have: 'model\.layers\.0\.mlp\.down_proj\.bias'"):
        open_checkpoint(tmp_path)


def test_how_matrices_are_packed_is_part_of_the_identity(plain, tmp_path):
    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    pack_folder(tmp_path, "gptq")
    before = identity(open_checkpoint(tmp_path))
    change_json(tmp_path / "config.json", quantization_config=CONFIGS["gptq"] | {"checkpoint_format": "gptq_v2"})
    assert identity(open_checkpoint(tmp_path)) != before


def test_a_packed_matrix_that_ends_early_is_named(plain, tmp_path):
    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    pack_folder(tmp_path, "awq")
    checkpoint = open_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"do not fit together|ends early"):
        checkpoint.read("model.layers.2.mlp.down_proj.weight")


def test_a_file_that_lacks_packed_bytes_is_refused_when_it_is_opened(plain, tmp_path):
    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    pack_folder(tmp_path, "gptq")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(tmp_path)


def test_a_config_that_is_refused_names_its_file(plain, tmp_path):
    (tmp_path / "config.json").write_bytes((plain / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((plain / "model.safetensors").read_bytes())
    change_json(tmp_path / "config.json", quantization_config={"quant_method": "quip"})
    with pytest.raises(CheckpointError, match=r"config\.json: weights quantised by quant_method 'quip'.*AWQ"):
        open_checkpoint(tmp_path)
