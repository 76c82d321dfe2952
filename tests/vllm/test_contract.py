"""The contract with vLLM, without vLLM: its recorded signatures, and the errors for what is missing."""

import json
import re
from pathlib import Path

import pytest

from stallfree.vllm import contract

RECORDED = json.loads((Path(__file__).parent / "signatures.json").read_text())
SOURCES = sorted((Path(contract.__file__).parent).glob("*.py"))


def test_what_is_used_is_as_recorded():
    assert {name: list(parameters) for name, parameters in contract.USED.items()} == RECORDED["signatures"]
    assert RECORDED["version"].startswith(contract.VERSIONS)


def test_every_attribute_that_the_pacer_reads_is_in_the_contract():
    text = "".join(path.read_text() for path in SOURCES if path.name in ("pacer.py", "draft.py"))
    read = set(re.findall(r"\bscheduler\.([a-z_]+)", text))
    known = {*contract.ATTRIBUTES, "block_size", "max_model_len", "_is_blocked_waiting_status", "py"}
    assert read - known == set()


def test_without_vllm_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(contract, "installed", lambda: None)
    with pytest.raises(ImportError, match="not installed: pip install"):
        contract.check()


def test_another_version_is_named(monkeypatch):
    monkeypatch.setattr(contract, "installed", lambda: "0.9.1")
    with pytest.raises(ImportError, match=r"knows vLLM 0\.32, not 0\.9\.1: pip install"):
        contract.check()


def test_another_signature_is_named(monkeypatch):
    monkeypatch.setattr(contract, "installed", lambda: "0.32.7")
    monkeypatch.setattr(contract, "signature", lambda name: ("self",))
    with pytest.raises(ImportError, match="its parameters are"):
        contract.check()
