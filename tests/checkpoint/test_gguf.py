"""GGUF files: quantised tensors are read back, and a file that cannot be used is refused with the reason."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stallfree.checkpoint import CheckpointError, ModelConfig, open_checkpoint
from stallfree.checkpoint.config import rotary_frequencies
from stallfree.checkpoint.identity import identity
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
    """A checkpoint of random numbers; those of a tensor depend only on its name."""

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
    """The text of the refusal, which always names the file."""
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
        values = checkpoint.read(name)
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, Random(CONFIG).read(name), rtol=0, atol=bound)


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
        ({"expert_count": 8}, "'llama.expert_used_count' is missing"),
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


def in_files(folder: Path, most: int = 9) -> list[Path]:
    """The model in several files."""
    write_gguf(folder / "model.gguf", Random(CONFIG), most_tensors=most)
    return sorted(folder.glob("*.gguf"))


@pytest.mark.parametrize("named", [0, 1, 2])
def test_a_model_in_several_files_is_loaded_whichever_is_named(tmp_path: Path, named: int) -> None:
    files = in_files(tmp_path)
    assert 3 == len(files)
    checkpoint = open_checkpoint(files[named])
    assert (CONFIG, files[0], tuple(files)) == (checkpoint.config, checkpoint.path, checkpoint.files)
    assert 160 == len(checkpoint.metadata["tokenizer.ggml.tokens"])
    for name in CONFIG.tensors():
        np.testing.assert_array_equal(Random(CONFIG).read(name), checkpoint.read(name))


def test_all_files_of_a_model_make_its_identity(tmp_path: Path) -> None:
    files = in_files(tmp_path)
    before = identity(open_checkpoint(files[0]))
    assert before == identity(open_checkpoint(files[2]))
    content = bytearray(files[2].read_bytes())
    content[-4:] = b"\x00\x00\x80\x3f"
    files[2].write_bytes(content)
    assert before != identity(open_checkpoint(files[0]))


@pytest.mark.parametrize("gone", [1, 2])
def test_a_file_that_is_missing_is_named(tmp_path: Path, gone: int) -> None:
    files = in_files(tmp_path)
    files[gone].unlink()
    with pytest.raises(CheckpointError, match=f"{files[gone].name}: is missing; a model in several files needs all"):
        open_checkpoint(files[0])
    with pytest.raises(CheckpointError, match=f"{files[gone].name}: is missing"):
        open_checkpoint(files[3 - gone])


def test_the_first_file_may_be_missing_too(tmp_path: Path) -> None:
    files = in_files(tmp_path)
    files[0].unlink()
    with pytest.raises(CheckpointError, match=f"{files[0].name}: is missing"):
        open_checkpoint(files[1])


def test_a_file_of_another_name_says_what_names_are_needed(tmp_path: Path) -> None:
    files = in_files(tmp_path)
    (other := tmp_path / "renamed.gguf").write_bytes(files[0].read_bytes())
    assert "is one of 3 files, whose names end in -00001-of-00003.gguf and so on" in refused(other)


def test_files_that_were_mixed_up_are_named(tmp_path: Path) -> None:
    files = in_files(tmp_path)
    files[1].write_bytes(files[2].read_bytes())
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf: it is part 2 \(from 0\) of 3"):
        open_checkpoint(files[0])


def test_a_truncated_file_among_several_is_named(tmp_path: Path) -> None:
    files = in_files(tmp_path)
    files[1].write_bytes(files[1].read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf: .*truncated"):
        open_checkpoint(files[0])


LINEAR = rotary_frequencies(32, 1e4, {"rope_type": "linear", "factor": 4.0}, "test")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("values", "frequencies", "scale"),
    [
        ({"rope.scaling.factor": 4.0}, LINEAR, 1.0),
        ({"rope.scale_linear": 4.0}, LINEAR, 1.0),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, LINEAR, 1.0),
        ({"rope.scaling.type": "linear", "rope.scale_linear": 4.0}, LINEAR, 1.0),
        ({"rope.scaling.factor": 4.0, "rope.scale_linear": 9.0}, LINEAR, 1.0),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, CONFIG.inv_freq, 1.0),
        ({"rope.scaling.type": "linear"}, CONFIG.inv_freq, 1.0),
        ({"rope.scaling.factor": 0.0}, CONFIG.inv_freq, 1.0),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
            rotary_frequencies(32, 1e4, YARN, "test"),
            1 + 0.1 * np.log(4),
        ),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 0.5},
            rotary_frequencies(32, 1e4, YARN | {"original_max_position_embeddings": 256}, "test"),
            0.5 * (1 + 0.1 * np.log(4)),
        ),
    ],
)
def test_scaled_positions_are_read_as_llama_cpp_reads_them(tmp_path: Path, values: dict, frequencies: tuple, scale: float) -> None:
    write_gguf(tmp_path / "m.gguf", Random(CONFIG), **values)
    config = open_checkpoint(tmp_path / "m.gguf").config
    np.testing.assert_allclose(config.inv_freq, frequencies)
    assert scale == pytest.approx(config.rope_scale)
    assert 256 == config.max_model_len


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope.scaling.type": "klingon", "rope.scaling.factor": 2.0}, "rope scaling 'klingon' is not supported"),
        ({"rope.scaling.factor": -2.0}, "'factor' is -2.0"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, "needs 'short_factor'"),
    ],
)
def test_scaling_that_cannot_be_is_named(tmp_path: Path, values: dict, message: str) -> None:
    write_gguf(tmp_path / "m.gguf", Random(CONFIG), **values)
    assert message in refused(tmp_path / "m.gguf")


@pytest.mark.parametrize("key", ["bos", "eos"])
@pytest.mark.parametrize("id", [160, 2**32 - 1, -1, "two", True])
def test_special_tokens_that_the_model_lacks_are_named_by_their_key(tmp_path: Path, key: str, id: object, monkeypatch) -> None:
    import gguf

    def add(writer: gguf.GGUFWriter, _: int) -> None:
        kinds = {str: writer.add_string, bool: writer.add_bool}
        kinds.get(type(id), writer.add_int64)(f"tokenizer.ggml.{key}_token_id", id)

    monkeypatch.setattr(gguf.GGUFWriter, f"add_{key}_token_id", add)
    write_gguf(tmp_path / "m.gguf", Random(CONFIG))
    message = refused(tmp_path / "m.gguf")
    assert f"'tokenizer.ggml.{key}_token_id' is {id!r}, expected a token id from 0 to 159; correct it" in message
