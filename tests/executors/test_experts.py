"""Experts whose weights have 4 bits in the file keep them on the OpenVINO executor."""

from pathlib import Path

import numpy as np
import pytest

from stallfree.checkpoint import open_checkpoint
from stallfree.executors.openvino import OpenVINOExecutor
from stallfree.executors.openvino.recipe import Recipe, compute_type
from tests.checkpoint.test_experts import packed, plain
from tests.executors.test_openvino import CLOSE, EXPERTS, GPT_OSS, KV, TOKENS, work
from tests.models import write_folder, write_gguf

__all__ = ["packed", "plain"]  # fixtures


def kinds(path: Path) -> dict[str, int]:
    """How many products of the compiled graph have weights of each type."""
    recipe = Recipe(open_checkpoint(path), "file", "f32", compute_type("file", "f32"), 256, None)
    nodes = recipe.compiled().get_runtime_model().get_ops()
    products = [node for node in nodes if node.get_rt_info()["layerType"].value == "FullyConnected"]
    names = [node.input(1).get_element_type().get_type_name() for node in products]
    return {name: names.count(name) for name in names}


def check_logits(path: Path) -> None:
    """The file's own codes give the logits of the numbers that they stand for, but for rounded activations."""
    results = []
    for weights in ("f32", "file"):
        executor = OpenVINOExecutor(open_checkpoint(path), weights=weights, kv="f32", kv_bytes=KV)
        results.append(executor.logits([work(TOKENS)]))
        executor.close()
    assert np.abs(results[1] - results[0]).mean() < CLOSE * results[0].std()


@pytest.mark.parametrize(
    ("family", "config", "kind", "type"),
    [("qwen3_moe", EXPERTS, "Q4_0", "i4"), ("qwen3_moe", EXPERTS, "MXFP4", "f4e2m1"), ("mixtral", {}, "Q4_0", "i4")],
)
def test_experts_of_a_gguf_file_keep_their_codes(family: str, config: dict, kind: str, type: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", family, num_hidden_layers=1, **config)
    write_gguf(tmp_path / "model.gguf", open_checkpoint(tmp_path / "folder"), kind)
    experts = config.get("num_experts", 8)
    assert 2 * experts <= kinds(tmp_path / "model.gguf")[type]
    check_logits(tmp_path / "model.gguf")


def test_experts_of_a_folder_in_mxfp4_keep_their_codes(packed: Path) -> None:
    assert {"f32": 1, "i8": 3, "f4e2m1": 2 * GPT_OSS["num_local_experts"]} == kinds(packed)
    check_logits(packed)
