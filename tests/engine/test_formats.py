"""Which format of weights the default takes: a trial's, made once for a machine and a file, and remembered."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from stallfree.checkpoint import open_checkpoint
from stallfree.engine import formats
from stallfree.executors.machine import memory
from stallfree.executors.openvino import trial
from tests.models import write_folder, write_gguf


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("plain")
    write_folder(folder, "llama", hidden_size=128, intermediate_size=256)
    return folder


@pytest.fixture
def checkpoint(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("STALLFREE_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "model.gguf", open_checkpoint(plain), "Q4_0")
    return open_checkpoint(tmp_path / "model.gguf")


@pytest.fixture
def trials(monkeypatch):
    """The trials that were made. Each finds that the file's own bits are quicker."""
    made = []

    def choose(checkpoint, *arguments):
        made.append(checkpoint.path.name)
        return trial.Trial("file", "it was quicker")

    monkeypatch.setattr(trial, "choose", choose)
    return made


def test_a_trial_is_made_once_and_remembered(checkpoint, trials):
    lines = []
    assert formats.chosen(checkpoint, None) == ("int8", "no trial was made yet; the first start makes it")
    assert formats.tried(checkpoint, "u8", None, lines.append) == ("file", "it was quicker")
    assert lines == ["trying the file's own bits and int8 on this machine, once", "weights file: it was quicker"]
    assert formats.tried(checkpoint, "u8", None, lines.append) == formats.chosen(checkpoint, None) == ("file", "it was quicker")
    assert len(trials) == 1
    assert len(lines) == 2
    formats.tried(checkpoint, "u8", 1, lines.append)
    assert len(trials) == 2, "another number of threads is another machine"


def test_a_file_without_codes_to_keep_needs_no_trial(plain, trials):
    found = formats.tried(open_checkpoint(plain), "u8", None, lambda line: None)
    assert found.weights == "int8"
    assert "no matrices of 4 or 8 bits" in found.why
    assert not trials


def test_numbers_in_mxfp4_keep_their_bits(plain, tmp_path, trials):
    write_gguf(tmp_path / "model.gguf", open_checkpoint(plain), "MXFP4")
    found = formats.tried(open_checkpoint(tmp_path / "model.gguf"), "u8", None, lambda line: None)
    assert found == formats.chosen(open_checkpoint(tmp_path / "model.gguf"), None)
    assert found.weights == "file"
    assert "MXFP4" in found.why
    assert not trials


def test_experts_are_not_tried(checkpoint, trials):
    mixture = replace(checkpoint, config=replace(checkpoint.config, family="mixtral", experts=4, active_experts=2))
    found = formats.tried(mixture, "u8", None, lambda line: None)
    assert found.weights == "int8"
    assert "experts are not tried" in found.why
    assert not trials


def test_what_the_disk_has_no_room_for_is_tried_again(checkpoint, trials, monkeypatch, caplog):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with caplog.at_level(logging.WARNING):
        assert formats.tried(checkpoint, "u8", None, lambda line: None).weights == "file"
    assert "No space left" in caplog.text
    assert formats.chosen(checkpoint, None).weights == "int8"


@pytest.mark.parametrize("text", ["", "{}", '{"weights": "bf16", "why": ""}', "[1]"])
def test_a_damaged_memory_is_no_memory(checkpoint, trials, text):
    formats.tried(checkpoint, "u8", None, lambda line: None)
    file = next(Path(checkpoint.path.parent / "cache" / "trials").iterdir())
    file.write_text(text)
    assert formats.chosen(checkpoint, None).weights == "int8"


def test_where_only_the_files_own_bits_fit_they_are_taken(checkpoint, trials, monkeypatch):
    needs = formats.weight_bytes(checkpoint, "file")
    monkeypatch.setattr(formats, "memory", lambda: replace(memory(), free=needs + 1))
    found = formats.tried(checkpoint, "u8", None, lambda line: None)
    assert found.weights == "file"
    assert "int8 would take more" in found.why
    assert not trials


def test_a_real_trial_names_a_format_and_its_figures(checkpoint):
    found = trial.choose(checkpoint, "u8", None)
    assert found.weights in ("file", "int8")
    assert "iterations of 3 layers take" in found.why
