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


def test_whether_a_graph_is_wanted_is_tried_once_for_each_format(checkpoint, monkeypatch):
    made, said = [], []
    monkeypatch.setattr(trial, "wants_graph", lambda _, weights, *more: (made.append(weights), (False, "it is slower"))[1])
    assert formats.graph(checkpoint.path, "file", "u8", None) is None
    for _ in range(2):
        found = formats.graph_tried(checkpoint, "file", "u8", None, lambda: said.append("trying"))
        assert found == formats.graph(checkpoint.path, "file", "u8", None) == (False, "it is slower")
    assert said == ["trying"]
    formats.graph_tried(checkpoint, "int8", "u8", None, lambda: None)
    assert made == ["file", "int8"]


@pytest.mark.parametrize("text", ["", "{}", '{"wanted": false}', "[1]"])
def test_a_damaged_memory_of_the_graph_is_no_memory(checkpoint, monkeypatch, text):
    monkeypatch.setattr(trial, "wants_graph", lambda *_: (False, "it is slower"))
    formats.graph_tried(checkpoint, "file", "u8", None, lambda: None)
    next(Path(checkpoint.path.parent / "cache" / "trials").iterdir()).write_text(text)
    assert formats.graph(checkpoint.path, "file", "u8", None) is None


@pytest.mark.parametrize("weights", ["file", "int8"])
def test_a_real_trial_of_the_graph_names_its_figures(checkpoint, weights):
    wanted, why = trial.wants_graph(checkpoint, weights, "u8", None)
    assert isinstance(wanted, bool)
    assert "without it, iterations of 3 layers take" in why
    # The model has contexts of 256 tokens.
    assert why.endswith("for 1, 4, 16, 80, 256 tokens)")


@pytest.mark.parametrize(("factor", "wanted"), [(0.5, False), (1.01, False), (1.05, True), (2, True)])
def test_the_graph_is_wanted_if_it_is_quicker(checkpoint, monkeypatch, factor, wanted):
    times = {tokens: trial.Ways(tokens, factor * tokens) for tokens in (1, 400)}
    monkeypatch.setattr(trial, "_times", lambda part, forms, *_: dict.fromkeys(forms, times))
    # A few tokens do without the graph anyway if that is quicker, and there is memory for both.
    assert trial.wants_graph(checkpoint, "int8", "u8", None)[0] is wanted
