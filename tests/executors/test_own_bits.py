"""Weights that keep the file's own bits stand for the file's numbers, and the graph computes with them."""

from dataclasses import replace

import numpy as np
import pytest

from stallfree.checkpoint import open_checkpoint
from stallfree.checkpoint.adapter import open_adapter
from stallfree.checkpoint.blocks import Blocks
from stallfree.core.plan import Work
from stallfree.executors.openvino import OpenVINOExecutor
from stallfree.executors.openvino.stored import Stored, eight_bits, own_bits
from tests.adapters import made_adapter
from tests.checkpoint.packing import CONFIGS, pack_folder
from tests.models import write_folder, write_gguf

CLOSE = 0.15
"""How far rounded activations may move a logit on average, in standard deviations."""
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}
TOKENS = np.random.default_rng(1).integers(3, 160, 40).tolist()


def restored(stored: Stored) -> np.ndarray:
    """The weights, [out, in], that a `Stored` stands for."""
    codes = stored.codes
    if codes.dtype == np.uint8:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(stored.shape).astype(np.int64)
        codes = np.where(codes > 7, codes - 16, codes) if stored.zeros is None else codes - stored.zeros
    values = codes * stored.scales
    if stored.least is not None:
        least = (stored.least * stored.least_scales).reshape(stored.shape[:-1])
        values = values + least[..., None]
    return values.reshape(len(values), -1)


@pytest.mark.parametrize(
    ("zeros", "kept"),
    [
        (lambda draw, shape: np.full(shape, 8.0), "signed"),
        (lambda draw, shape: draw.integers(0, 16, shape).astype(float), "zeros"),
        (lambda draw, shape: draw.uniform(0, 15, shape), "least"),
        (lambda draw, shape: draw.uniform(-40, 40, shape), "least"),
    ],
    ids=["8", "whole", "any", "far"],
)
def test_codes_are_kept_and_stand_for_the_same_numbers(zeros, kept):
    draw, rows, groups = np.random.default_rng(2), 48, 64
    scales = draw.uniform(0.001, 0.01, (rows, groups)).astype(np.float32)
    parts = [
        Blocks.of_codes(draw.integers(0, 16, (16, 32 * groups), np.uint8), scales[at : at + 16], own)
        for at, own in zip((0, 16, 32), np.split(zeros(draw, (rows, groups)).astype(np.float32), 3), strict=True)
    ]
    stored, wanted = own_bits(parts), np.concatenate([part.dense() for part in parts])
    assert stored.shape == (rows, groups, 32)
    assert {"signed": stored.zeros is stored.least is None, "zeros": stored.least is None, "least": stored.zeros is None}[kept]
    # Least weights are rounded to 1 / 254 of the largest of 32.
    most = np.abs(wanted).max() / 200 if kept == "least" else 1e-6
    assert np.abs(restored(stored) - wanted).max() <= most


@pytest.mark.parametrize("group", [32, 0])
def test_eight_bits_are_as_near_as_eight_bits_can_be(group):
    values = np.random.default_rng(3).standard_normal((70, 96)).astype(np.float32)
    stored = eight_bits(values, group)
    steps = np.repeat(stored.scales, stored.shape[-1], axis=-1).reshape(values.shape)
    assert (np.abs(restored(stored) - values) <= steps / 2 * 1.001).all()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("plain")
    write_folder(folder, "llama", **SIZES)
    return folder


@pytest.fixture(params=["Q4_0", "Q4_1", "Q8_0", *CONFIGS])
def checkpoint(request, plain, tmp_path):
    if request.param in CONFIGS:
        for file in plain.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        pack_folder(tmp_path, request.param)
        return open_checkpoint(tmp_path)
    write_gguf(tmp_path / "model.gguf", open_checkpoint(plain), request.param)
    return open_checkpoint(tmp_path / "model.gguf")


def logits(executor: OpenVINOExecutor, adapter: str = "") -> np.ndarray:
    blocks = tuple(range(-(-len(TOKENS) // executor.capacity.block_size)))
    return executor.logits([Work("a", 0, len(TOKENS), True, False, tuple(TOKENS), blocks, None, adapter, tuple(TOKENS), ())])


def test_the_graph_computes_with_the_files_own_bits(checkpoint, tmp_path):
    exact = logits(OpenVINOExecutor(checkpoint, weights="f32", kv="f32", kv_bytes=1 << 21))
    folder = tmp_path / "kept"
    first, second = (OpenVINOExecutor(checkpoint, weights="file", kv="f32", kv_bytes=1 << 21, folder=folder) for _ in "12")
    found = logits(first)
    assert np.abs(found - exact).mean() < CLOSE * exact.std()
    assert len(list(folder.iterdir())) == 1
    assert np.array_equal(logits(second), found)


def test_matrices_that_are_fused_may_have_codes_of_different_forms(plain, tmp_path):
    kinds = {"k_proj": "MXFP4", "v_proj": "Q8_0", "up_proj": "MXFP4", "down_proj": "F32"}
    write_gguf(tmp_path / "model.gguf", open_checkpoint(plain), "Q4_1", kinds=kinds)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert {"int4", "int8", "e2m1"} == set(checkpoint.codes.values())
    exact, found = (logits(OpenVINOExecutor(checkpoint, weights=form, kv="f32", kv_bytes=1 << 21)) for form in ("f32", "file"))
    assert np.abs(found - exact).mean() < CLOSE * exact.std()


def test_adapters_work_with_the_files_own_bits_and_a_second_graph_converts_nothing_again(plain, tmp_path):
    write_gguf(tmp_path / "model.gguf", open_checkpoint(plain), "Q4_1")
    checkpoint, read = open_checkpoint(tmp_path / "model.gguf"), []

    def blocks(name: str) -> Blocks:
        read.append(name)
        return checkpoint.blocks(name)

    adapter = open_adapter(made_adapter(tmp_path / "adapter", checkpoint.config), checkpoint.config)
    found = []
    for form in ("f32", "file"):
        executor = OpenVINOExecutor(replace(checkpoint, blocks=blocks), weights=form, kv="f32", kv_bytes=1 << 23)
        before = logits(executor)
        executor.load_adapter("a", adapter, tuple(range(20, 20 + executor.adapter_blocks(adapter))))
        found.append(logits(executor, "a"))
        assert np.abs(found[-1] - before).mean() > CLOSE * before.std()
        assert np.array_equal(logits(executor), before)
    assert np.abs(found[1] - found[0]).mean() < CLOSE * found[0].std()
    assert len(read) == len(set(read)) > 0


def test_int8_from_the_kept_file_is_int8(plain, tmp_path):
    checkpoint = open_checkpoint(plain)
    without = logits(OpenVINOExecutor(checkpoint, weights="int8", kv="f32", kv_bytes=1 << 21))
    for _ in range(2):
        kept = OpenVINOExecutor(checkpoint, weights="int8", kv="f32", kv_bytes=1 << 21, folder=tmp_path)
        assert np.array_equal(logits(kept), without)
