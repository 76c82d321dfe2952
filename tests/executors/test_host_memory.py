"""What a model takes of this machine's memory is known before it is loaded; one that does not fit is refused with what would."""

from pathlib import Path

import pytest

from stallfree.checkpoint import Checkpoint, ModelConfig
from stallfree.executors.host_memory import (
    MOST_KV,
    check_memory,
    check_model,
    default_kv_bytes,
    kv_bytes_per_token,
    weight_bytes,
)
from stallfree.executors.machine import memory
from tests.machines import GIB, container, pretend

FORMATS = ("int8", "bf16", "f32")


def checkpoint(layers: int = 16, files: tuple[Path, ...] = ()) -> Checkpoint:
    """A model of 1.1 billion weights, of which nothing can be read."""
    config = ModelConfig(
        family="llama", num_layers=layers, hidden_size=2048, num_heads=32, num_kv_heads=8, head_dim=64, ffn_size=8192,
        vocab_size=32000, max_model_len=8192, norm_eps=1e-5, inv_freq=(1.0,) * 32, windows=(0,) * layers,
    )  # fmt: skip

    def read(name: str):
        raise AssertionError(f"{name} is read")

    return Checkpoint(Path("large.gguf"), config, read, {}, files)


def test_the_limit_of_the_container_counts_and_not_the_machine_s_memory(tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch, files=container(memory=2 * GIB, used=GIB // 2))
    assert 3 * GIB // 2 == memory().free
    assert 3 * GIB // 8 == default_kv_bytes(0)


def test_the_default_kv_cache_is_a_quarter_of_what_is_free_and_bounded(tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch, free=8 * GIB)
    assert 2 * GIB == default_kv_bytes(GIB)
    assert int(0.9 * 8 * GIB) - 6 * GIB == default_kv_bytes(6 * GIB)
    assert 0 == default_kv_bytes(8 * GIB)
    pretend(tmp_path, monkeypatch, free=20 * GIB)
    assert MOST_KV == default_kv_bytes(GIB)


def test_weights_have_the_size_of_their_format(tmp_path):
    model = checkpoint()
    bits = [weight_bytes(model, form) for form in ("int8", "bf16", "f32")]
    assert [model.config.parameters * each for each in (1.0625, 2, 4)] == pytest.approx(bits, rel=1e-3)
    (tmp_path / "large.gguf").write_bytes(b"x" * 1000)
    assert 1000 == weight_bytes(checkpoint(files=(tmp_path / "large.gguf",)), "as in the file")


@pytest.mark.parametrize(("kv", "each"), [("u8", 144), ("u4", 112), ("bf16", 256), ("f32", 512)])
def test_a_token_of_kv_has_the_size_of_its_format(kv, each):
    assert 16 * 8 * each == kv_bytes_per_token(checkpoint().config, kv)


def test_a_kv_cache_beyond_the_container_s_limit_is_refused_with_the_limit(tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch, files=container(memory=2 * GIB, used=GIB))
    check_memory(GIB)
    with pytest.raises(MemoryError, match=r"needs 1\.50 GiB and 1\.00 GiB of memory \(/sys/fs/cgroup/memory\.max allows 2\.00 GiB"):
        check_memory(3 * GIB // 2)


@pytest.mark.parametrize(
    ("limit", "form", "kv_bytes", "fits"),
    [
        (
            3,
            "bf16",
            GIB,
            r"bf16 weights take 2\.06 GiB and the KV cache 1\.00 GiB, and 3\.00 GiB of .* give --kv-memory 65\dMiB or less",
        ),
        (2, "bf16", 0, r"give --weights int8, which take 1\.09 GiB"),
        (2, "f32", GIB, r"give --weights int8"),
        (1, "int8", GIB // 4, r"take a model of at most 0\.9 billion weights, or allow this process more memory"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_with_what_would(tmp_path, monkeypatch, limit, form, kv_bytes, fits):
    pretend(tmp_path, monkeypatch, files=container(memory=limit * GIB))
    with pytest.raises(MemoryError, match=rf"large.gguf does not fit: .*{fits}"):
        check_model(checkpoint(), form, "u8", kv_bytes, FORMATS)


def test_groups_with_all_weights_each_are_refused_with_what_fits_for_each(tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch, files=container(memory=6 * GIB))
    check_model(checkpoint(), "bf16", "bf16", GIB, FORMATS, 2)
    with pytest.raises(
        MemoryError, match=r"4 copies of bf16 weights take 8.2\d GiB .* give --weights int8, .* for each copy; or take fewer groups"
    ):
        check_model(checkpoint(), "bf16", "bf16", GIB, FORMATS, 4)


def test_a_model_that_fits_is_not_refused(tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch, files=container(memory=3 * GIB))
    check_model(checkpoint(), "int8", "u8", GIB, FORMATS)
