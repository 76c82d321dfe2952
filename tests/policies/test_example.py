"""The policy that the documentation prints does what it says, from a file of its own, in this process and in others."""

import json
import re
import sys
from pathlib import Path

import pytest

from stallfree.cli import main
from stallfree.core.plan import Capacity
from stallfree.core.request import Request
from stallfree.policies import load
from tests.virtual import run

DOCUMENT = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, in which the example is."""
    (example,) = re.findall(r"```python\n(class ShortestFirst.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (tmp_path / "shortest.py").write_text(example)
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


@pytest.mark.parametrize("name", ["./shortest.py:ShortestFirst", "shortest:ShortestFirst"])
def test_searches_find_it_in_their_processes(folder, name, monkeypatch, capfd):
    search = ("--lengths", "300/10", "--slo", "tbt=40ms", "--start", "4", "--tolerance", "0.5", "--requests", "64", "--json")
    monkeypatch.setattr(sys, "argv", ["stallfree", "capacity", name, "--model", "llama3-8b", *search])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capfd.readouterr()
    assert not end.value.code, err
    assert json.loads(out)["configurations"][name]["capacity"] > 0
