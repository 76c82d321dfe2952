"""`stallfree vllm serve` without vLLM: what it hands on, and what it refuses."""

import importlib.util
import os

import pytest

from stallfree.cli import vllm


@pytest.fixture
def handed_on(monkeypatch):
    """The arguments that vLLM's own command line would get."""
    taken: list[list[str]] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(vllm, "_run", taken.append)
    for name in ("STALLFREE_SLO", "STALLFREE_RECORD", vllm.METRICS):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return taken


def test_without_vllm_it_says_what_to_install(stallfree, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, error = stallfree("vllm", "serve", "some/model")
    assert code == 1
    assert "vLLM is not installed: pip install" in error


def test_all_other_options_are_vllms(stallfree, handed_on, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = ["--record", "run.jsonl"]
    code, _, _ = stallfree("vllm", "serve", "some/model", "--slo", "tbt=100ms", *record, "--dtype", "bfloat16", "--port", "8001")
    assert code == 0
    assert handed_on == [["serve", "some/model", "--dtype", "bfloat16", "--port", "8001", "--scheduler-cls", vllm.SCHEDULER]]
    assert os.environ["STALLFREE_SLO"] == "tbt=100ms"
    assert os.environ["STALLFREE_RECORD"] == str(tmp_path / "run.jsonl")


def test_its_own_scheduler_can_be_left_to_vllm(stallfree, handed_on):
    stallfree("vllm", "serve", "some/model", "--no-scheduler")
    assert handed_on == [["serve", "some/model"]]
    assert "STALLFREE_SLO" not in os.environ


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--slo", "tbt=100"], "tbt=100 has no unit"),
        (["--slo", "fast"], "is not a latency target"),
        (["--slo", "tbt=0ms"], "a latency target is a time above 0"),
    ],
)
def test_bad_targets_are_refused_before_vllm_starts(stallfree, handed_on, arguments, says):
    code, _, error = stallfree("vllm", "serve", "some/model", *arguments)
    assert code == 1
    assert says in error
    assert handed_on == []
