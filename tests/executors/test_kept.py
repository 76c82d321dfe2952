"""Converted matrices in a file: the same arrays the next time, and never those of a damaged or another file."""

import errno
import logging

import numpy as np
import pytest

from stallfree.executors.openvino.kept import HEADER, Kept

ARRAYS = {
    "codes": np.arange(-6, 6, dtype=np.int8).reshape(2, 3, 2),
    "pairs": np.arange(9000, dtype=np.uint16),
    "scales": np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3, 1),
}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "converted" / "model-int8.kept"


def written(file, key="a") -> Kept:
    kept = Kept(file, key)
    assert not kept.whole
    for name, array in ARRAYS.items():
        assert (kept.put(name, array) == array).all()
    kept.finish()
    assert kept.whole
    return kept


def test_the_next_start_has_the_same_arrays(file):
    written(file)
    seen = []
    kept = Kept(file, "a", lambda done, of: seen.append((done, of)))
    assert kept.whole
    total = sum(array.nbytes for array in ARRAYS.values())
    assert seen[-1] == (total, total)
    with kept.lean():
        assert (kept.get("codes") == ARRAYS["codes"]).all()
    for name, array in ARRAYS.items():
        mapped = kept.get(name)
        assert (mapped.dtype, mapped.shape) == (array.dtype, array.shape)
        assert (mapped == array).all()
    assert kept.get("another") is None


def test_arrays_may_come_while_memory_is_given_back(file, monkeypatch):
    kept = Kept(file, "a")
    kept.put("codes", ARRAYS["codes"])
    monkeypatch.setattr("stallfree.executors.openvino.kept._release", lambda _: kept.put("pairs", ARRAYS["pairs"]))
    kept.release()
    assert (kept.get("pairs") == ARRAYS["pairs"]).all()


def test_a_file_that_was_not_finished_is_not_there(file):
    kept = Kept(file, "a")
    kept.put("codes", ARRAYS["codes"])
    assert not file.exists()
    assert not Kept(file, "a").whole


def test_what_a_process_that_ended_left_is_removed(file):
    file.parent.mkdir()
    left = file.with_suffix(".4194304")  # beyond the highest process id
    left.write_bytes(b"half")
    written(file)
    assert [each.name for each in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:4100] + bytes([data[4100] ^ 1]) + data[4101:],
        lambda data: data[:9000] + bytes([data[9000] ^ 1]) + data[9001:],
        lambda data: data[:-10] + bytes([data[-10] ^ 1]) + data[-9:],
        lambda data: b"x" * HEADER + data[HEADER:],
        lambda data: b"{}" + data[2:],
        lambda data: b"",
    ],
    ids=["a byte short", "half", "first array", "second array", "index", "no JSON", "another JSON", "empty"],
)
def test_a_damaged_file_is_made_anew(file, damage, caplog):
    written(file)
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.WARNING):
        kept = Kept(file, "a")
    assert not kept.whole
    assert kept.get("codes") is None
    assert "cannot be used" in caplog.text
    written(file)
    assert Kept(file, "a").whole


def test_a_file_of_another_model_or_version_is_not_used(file):
    written(file)
    assert not Kept(file, "b").whole


def test_a_full_disk_loses_nothing(file, monkeypatch, caplog):
    kept = Kept(file, "a")
    kept.put("codes", ARRAYS["codes"])

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Kept, "_write", full)
    assert (kept.put("scales", ARRAYS["scales"]) == ARRAYS["scales"]).all()
    kept.finish()
    assert (kept.get("codes") == ARRAYS["codes"]).all()
    assert not list(file.parent.iterdir())
    assert "No space left" in caplog.text
