"""GGUF files: quantised tensors come back, and a file that cannot be used is refused by what is wrong with it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stallfree.checkpoint import CheckpointError, ModelConfig, open_checkpoint
from stallfree.checkpoint.config import rotary_frequencies
from tests.models import write_gguf

CONFIG = ModelConfig(
    family="llama",
    vocab_size=160,
    num_layers=2,
    hidden_size=64,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    ffn_size=96,
    norm_eps=2.0**-16,
    inv_freq=rotary_frequencies(32, 1e4, {}, "test"),
    max_model_len=256,
    windows=(0, 0),
    tie_embeddings=True,
    bos_token_id=1,
    eos_token_ids=(2,),
)


class Random:
    """A checkpoint made of random numbers, the same for the same name."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def read(self, name: str) -> np.ndarray:
        return np.random.default_rng(len(name) + ord(name[-9])).normal(size=self.config.tensors()[name]).astype(np.float32)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    write_gguf(path, Random(CONFIG))
    return path


def refused(path: Path) -> str:
    """What the refusal says; it always names the file."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_the_config_is_read(file: Path) -> None:
    assert CONFIG == open_checkpoint(file).config


def test_metadata_are_plain_python_values(file: Path) -> None:
    metadata = open_checkpoint(file).metadata
    assert [f"t{i}" for i in range(160)] == metadata["tokenizer.ggml.tokens"]
    assert "llama" == metadata["general.architecture"]
    assert 2 == metadata["tokenizer.ggml.eos_token_id"]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_tensors_come_back_under_their_names(tmp_path: Path, kind: str) -> None:
    write_gguf(tmp_path / "m.gguf", Random(CONFIG), kind)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    bound = {"F32": 0, "F16": 0.002, "BF16": 0.02, "Q8_0": 0.03}.get(kind, 0.5)
    for name in CONFIG.tensors():
        got = checkpoint.read(name)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, Random(CONFIG).read(name), rtol=0, atol=bound)


def test_rope_freqs_divide_the_frequencies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    write = gguf.GGUFWriter.write_header_to_file

    def with_divisors(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.full(16, 4, np.float32))
        write(writer)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_divisors)
    write_gguf(tmp_path / "m.gguf", Random(CONFIG))
    assert tuple(f / 4 for f in CONFIG.inv_freq) == open_checkpoint(tmp_path / "m.gguf").config.inv_freq


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "none.gguf")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"<html>" * 20])
def test_something_else_is_not_a_gguf_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert "not a GGUF file" in refused(path)


@pytest.mark.parametrize("fraction", [0.0005, 0.01, 0.02, 0.3, 0.999])
def test_a_truncated_file_is_refused(file: Path, fraction: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: 24 + int(len(content) * fraction)])
    assert "truncated" in refused(file)


def test_an_unknown_version_is_refused(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[4] = 9
    file.write_bytes(content)
    assert "version 9" in refused(file)


def test_another_architecture_is_refused_with_those_supported(file: Path) -> None:
    content = file.read_bytes().replace(b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05\x00\x00\x00\x00\x00\x00\x00gemma", 1)
    file.write_bytes(content)
    assert "architecture 'gemma' is not supported; supported in GGUF are llama, qwen2, qwen3" in refused(file)


def test_missing_tensors_are_named(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"blk.1.attn_k.weight", b"blk.1.attn_z.weight"))
    assert "'model.layers.1.self_attn.k_proj.weight'" in refused(file)


@pytest.mark.parametrize(
    "key", ["block_count", "embedding_length", "attention.head_count", "context_length", "feed_forward_length"]
)
def test_missing_metadata_is_named(tmp_path: Path, key: str) -> None:
    write_gguf(tmp_path / "m.gguf", Random(CONFIG), **{key: None})
    assert f"'llama.{key}' is missing" in refused(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention.head_count_kv": 3}, "2 attention heads cannot share 3 KV heads"),
        ({"rope.dimension_count": 16}, "16 of 32 dimensions"),
        ({"feed_forward_length": 128}, "has shape"),
        ({"block_count": 0}, "'llama.block_count' is 0"),
        ({"expert_count": 8}, "mixture of experts"),
    ],
)
def test_metadata_that_do_not_fit_are_refused(tmp_path: Path, values: dict[str, int], message: str) -> None:
    write_gguf(tmp_path / "m.gguf", Random(CONFIG), **values)
    assert message in refused(tmp_path / "m.gguf")


def _grow(content: bytearray, marker: bytes, offset: int, form: int = 8) -> bytearray:
    """Puts an absurd number `offset` bytes after `marker`."""
    at = content.index(marker) + len(marker) + offset
    content[at : at + form] = b"\xff" * (form - 1) + b"\x0f"
    return content


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: _grow(c, b"GGUF", 4),  # the number of tensors
        lambda c: _grow(c, b"GGUF", 12),  # the number of key-value pairs
        lambda c: _grow(c, b"tokenizer.ggml.tokens", 8),  # the length of an array
        lambda c: _grow(c, b"tokenizer.ggml.tokens", 16),  # the length of its first string
        lambda c: _grow(c, b"token_embd.weight", 4),  # a dimension
        lambda c: _grow(c, b"token_embd.weight", 24),  # an offset
    ],
)
def test_absurd_sizes_are_refused_before_they_are_used(file: Path, damage: Callable[[bytearray], bytearray]) -> None:
    file.write_bytes(damage(bytearray(file.read_bytes())))
    refused(file)
