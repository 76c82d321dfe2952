"""The policy, model family and executor that docs/extending.md prints work as printed, and do what it says."""

import json
import re
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from stallfree import LLM
from stallfree.bench.server import server
from stallfree.checkpoint import open_checkpoint
from stallfree.checkpoint.families import FAMILIES
from stallfree.cli import main
from stallfree.core.plan import Capacity
from stallfree.core.request import Request
from stallfree.engine.assemble import Options, assemble
from stallfree.policies import load
from tests.engine.tokenizers import byte_level
from tests.models import reference, write_folder
from tests.virtual import run
from tests.waiting import PATIENCE_S

DOCUMENT = Path(__file__).parents[1] / "docs" / "extending.md"


def example(word: str) -> str:
    """The printed Python that has `word`."""
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL) if word in code)
    return code


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, in which the examples are."""
    (tmp_path / "shortest.py").write_text(example("ShortestFirst"))
    (tmp_path / "echo.py").write_text(example("Echo"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def order(policy: str, **options: object) -> list[str]:
    """Requests by their first token; they come together, the long prompts first."""
    lengths = {"long": 400, "middle": 200, "short": 100, "tiny": 10}
    requests = [Request(id, range(1000 * i, 1000 * i + length), 3) for i, (id, length) in enumerate(lengths.items())]
    records = run(load(policy, **options), requests, Capacity(16, 1000, 4096))
    return list(dict.fromkeys(id for record in records for id in record.emitted))


def test_it_orders_what_waits(folder):
    assert ["long", "middle", "short", "tiny"] == order("sarathi", token_budget=64)
    assert ["tiny", "short", "middle", "long"] == order("./shortest.py:ShortestFirst")


@pytest.mark.parametrize("name", ["./shortest.py:ShortestFirst", pytest.param("shortest:ShortestFirst", marks=pytest.mark.slow)])
def test_searches_find_it_in_their_processes(folder, name, monkeypatch, capfd):
    search = ("--lengths", "300/10", "--slo", "tbt=40ms", "--start", "4", "--tolerance", "0.5", "--requests", "64", "--json")
    monkeypatch.setattr(sys, "argv", ["stallfree", "capacity", name, "--model", "llama3-8b", *search])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capfd.readouterr()
    assert not end.value.code, err
    assert json.loads(out)["configurations"][name]["capacity"] > 0


@pytest.mark.parametrize("executor", ["openvino", "torch"])
def test_a_family_is_a_row_of_the_table(executor, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from tests.executors.test_openvino import TOKENS, work

    monkeypatch.setitem(FAMILIES, "seed_oss", None)  # gone again after the test
    exec(example("seed_oss"), {})
    expected = reference(write_folder(tmp_path, "seed_oss", attention_bias=True), TOKENS)
    checkpoint = open_checkpoint(tmp_path)
    if executor == "torch":
        from stallfree.executors import torch

        runs = torch.TorchExecutor(checkpoint, torch.Options("f32", "f32"), 1 << 22)
    else:
        from stallfree.executors.openvino import OpenVINOExecutor

        runs = OpenVINOExecutor(checkpoint, weights="f32", kv="f32", kv_bytes=1 << 22)
    logits = runs.logits([work(TOKENS)._replace(blocks=tuple(range(6)))])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


@pytest.fixture
def model(tmp_path_factory) -> str:
    """A folder with a small model and its tokenizer."""
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("model")
    write_folder(path, "llama")
    byte_level().save(str(path / "tokenizer.json"))
    return str(path)


@pytest.mark.parametrize("name", ["./echo.py:Echo", "echo:Echo"])
def test_an_executor_runs_as_printed(folder, model, name):
    with LLM(model, executor=name, kv_memory=1 << 20) as llm:
        assert [(7,) * 5, (9,) * 5] == [done.tokens for done in llm.generate([[3, 7], [4, 5, 9]], max_tokens=5, ignore_eos=True)]


def test_a_server_runs_it_although_its_kv_cannot_be_transferred(folder, model):
    with server([model, "--executor", "./echo.py:Echo", "--policy", "sarathi"]) as url:
        body = {"prompt": [3, 7], "max_tokens": 3, "logprobs": None, "ignore_eos": True}
        usage = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S).json()["usage"]
    assert 3 == usage["completion_tokens"]


OPTIONAL = """
class Picky:
    def __init__(self, checkpoint, weights, **others): raise AssertionError("made")
    def submit(self, plan): ...
"""


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("./eco.py:Echo", {}, "executor './eco.py:Echo': there is no file ./eco.py.*did you mean 'echo.py'"),
        ("./echo.py:Eco", {}, "has no 'Eco'.*did you mean 'Echo'.*it has Echo"),
        ("./shortest.py:ShortestFirst", {}, "ShortestFirst in .*shortest.py is not a class with a method `submit`"),
        ("./broken.py:Echo", {}, "executor './broken.py:Echo': .*broken.py, line 1: ZeroDivisionError"),
        ("./echo.py:Echo", {"weights": "int8"}, "executor './echo.py:Echo' takes no weights; it takes kv_bytes"),
        ("./echo.py:Echo", {"tp": 2}, "is one process; --executor torch takes tp"),
        ("./picky.py:Picky", {}, r"executor './picky.py:Picky' needs weights, which was not given \(--weights\)"),
        ("openvin", {}, "unknown executor 'openvin'.*did you mean 'openvino'.*or path/to/file.py:Class"),
    ],
)
def test_an_executor_that_cannot_be_used_is_named_with_the_way_out(folder, model, name, options, says):
    (folder / "broken.py").write_text("1 / 0")
    (folder / "picky.py").write_text(OPTIONAL)
    with pytest.raises(ValueError, match=says):
        assemble(Options(model, executor=name, **options))
