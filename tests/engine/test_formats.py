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

    def choose(checkpoint, forms, *arguments, large):
        made.append(checkpoint.path.name)
        graphs = {form: trial.Graph(not large, "it was tried") for form in forms}
        return trial.Trial("file", "it was quicker", graphs)

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
    for file in Path(checkpoint.path.parent / "cache" / "trials").iterdir():
        file.write_text(text)
    assert formats.chosen(checkpoint, None).weights == "int8"


def test_where_only_the_files_own_bits_fit_they_are_taken(checkpoint, trials, monkeypatch):
    needs = formats.weight_bytes(checkpoint, "file")
    monkeypatch.setattr(formats, "memory", lambda: replace(memory(), free=needs + 1))
    found = formats.tried(checkpoint, "u8", None, lambda line: None)
    assert found.weights == "file"
    assert "int8 would take more" in found.why
    assert not trials


def test_whether_a_graph_is_wanted_is_tried_once_for_each_format(checkpoint, trials, monkeypatch):
    monkeypatch.setattr(formats, "LARGE", 1000)
    said = []
    assert formats.graph(checkpoint.path, "int8", "u8", None) is None
    for _ in range(2):
        found = formats.graph_tried(checkpoint, "int8", "u8", None, lambda: said.append("trying"))
        assert found == formats.graph(checkpoint.path, "int8", "u8", None) == (False, "it was tried")
    assert said == ["trying"]
    assert len(trials) == 1
    formats.tried(checkpoint, "u8", None, lambda line: None)
    formats.graph_tried(checkpoint, "file", "u8", None, lambda: pytest.fail("the trial of the formats has found it"))
    assert len(trials) == 2


def test_small_models_have_a_graph(checkpoint, trials):
    assert not formats.is_large(checkpoint)
    assert formats.graph_tried(checkpoint, "file", "u8", None, lambda: None).wanted


@pytest.mark.parametrize("text", ["", "{}", '{"wanted": false}', "[1]"])
def test_a_damaged_memory_of_the_graph_is_no_memory(checkpoint, trials, text):
    formats.graph_tried(checkpoint, "file", "u8", None, lambda: None)
    next(Path(checkpoint.path.parent / "cache" / "trials").iterdir()).write_text(text)
    assert formats.graph(checkpoint.path, "file", "u8", None) is None


def test_a_real_trial_names_its_figures(checkpoint):
    found = trial.choose(checkpoint, trial.FORMS, "u8", None, large=True)
    assert found.weights in trial.FORMS
    assert "iterations of 3 layers take" in found.why
    for graph in found.graphs.values():
        assert "without it, iterations of 3 layers take" in graph.why
        assert graph.why.endswith("for 1, 4, 16, 80, 256 tokens)")


@pytest.fixture
def timed(monkeypatch):
    """Makes trials find these seconds of each format for 4 tokens, by the graph and without; 400 tokens take 100 times as long."""

    def given(**seconds: tuple[float, float | None]) -> None:
        ways = tuple(
            {form: {} if each[way] is None else {4: each[way], 400: 100 * each[way]} for form, each in seconds.items()}
            for way in range(2)
        )
        monkeypatch.setattr(trial, "_times", lambda *_: ways)

    return given


@pytest.mark.parametrize(("without", "wanted"), [(0.5, False), (1.01, False), (1.05, True), (2, True), (None, True)])
def test_the_graph_is_wanted_if_it_is_quicker(checkpoint, timed, without, wanted):
    timed(int8=(1, without))
    # Few tokens do without it anyway, so for them it is as quick.
    assert trial.choose(checkpoint, ["int8"], "u8", None, large=True).graphs["int8"].wanted is wanted
    assert trial.choose(checkpoint, ["int8"], "u8", None, large=False).graphs["int8"].wanted


@pytest.mark.parametrize(
    ("file", "int8", "weights"),
    [
        ((1, None), (1.1, None), "file"),
        ((1.01, None), (1, None), "file"),
        ((1.1, None), (1, None), "int8"),
        ((3, 0.7), (1, 0.9), "file"),
    ],
)
def test_each_format_is_judged_by_the_quicker_of_its_ways(checkpoint, timed, file, int8, weights):
    timed(file=file, int8=int8)
    assert trial.choose(checkpoint, trial.FORMS, "u8", None, large=True).weights == weights


def test_a_model_without_memory_for_both_takes_one_way_for_all(checkpoint, timed, monkeypatch):
    monkeypatch.setattr(trial, "obstacle", lambda *_, copies=2: "it lacks memory" if copies == 2 else "")
    timed(file=(1, 1.05), int8=(1, 0.9))
    found = trial.choose(checkpoint, trial.FORMS, "u8", None, large=True)
    assert {form: graph.wanted for form, graph in found.graphs.items()} == {"file": True, "int8": False}
    assert found.weights == "int8"
