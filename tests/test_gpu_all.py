"""`benchmarks/gpu_all.py` runs dry on a processor with little installed. A part that fails, crashes or hangs costs itself alone."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_all.py"
NEEDED = {"torch", "triton", "numpy", "tokenizers"}
HOOK = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""
PART = """
import os
from gpu.made import Absent

def wrong():
    raise ValueError("a wrong turn")

def absent():
    raise Absent("needs luck")

def cases(device, quick):
    return [
        ("good", lambda: {"ms": 2.0}),
        ("raises", wrong),
        ("crashes", lambda: os._exit(7)),
        ("inexact", lambda: {"error": 2, "limit": 1}),
        ("nan", lambda: {"error": float("nan"), "limit": 1}),
        ("lacks", absent),
        ("exact", lambda: {"error": 1, "limit": 1}),
    ]
"""


def missing() -> set[str]:
    """The modules that stallfree can need, except those that the script may use."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    names = {name.partition(">")[0].partition("=")[0].partition("[")[0].replace("-", "_") for name in listed}
    return names - NEEDED - {"pytest"} | {"flashinfer", "pydantic", "starlette"}


def environment(folder: Path) -> dict[str, str]:
    (folder / "sitecustomize.py").write_text(HOOK.format(names=missing()))
    return os.environ | {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("gpu_all")
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--out", str(folder / "out"), "--json", str(folder / "own.json")]
    ran = subprocess.run(command, env=environment(folder), cwd=folder, capture_output=True, text=True, check=False)
    assert 0 == ran.returncode, ran.stdout + ran.stderr
    return folder, json.loads((folder / "own.json").read_text())


@pytest.mark.slow
def test_every_part_is_run_or_says_why_it_needs_a_gpu(results):
    parts = results[1]["parts"]
    expected = ["facts", "attention", "models", "transfer", "operators", "steps", "adapters", "engines", "striped", "theirs"]
    assert expected == list(parts)
    assert {"theirs": "needs cuda"} == {name: part["status"] for name, part in parts.items() if part["status"] != "ok"}
    for row in (row for part in parts.values() for row in part["rows"]):
        assert row["status"] in ("ok", "needs cuda") or row["case"] == "hardware", row
        assert row["status"] == "ok" or row["why"], row


@pytest.mark.slow
def test_what_is_checked_is_within_its_limit(results):
    parts = results[1]["parts"]
    for name in ("attention", "models", "operators", "transfer", "adapters"):
        assert all(row["error"] <= row["limit"] for row in parts[name]["rows"] if row["status"] == "ok" and "error" in row)
    assert [0] == [row["computed here"] for row in parts["transfer"]["rows"]]


@pytest.mark.slow
def test_what_is_measured_has_a_time(results):
    parts = results[1]["parts"]
    assert all(row["ms"] > 0 < row["least, ms"] for row in parts["steps"]["rows"])
    assert all(row["iteration, ms"] > 0 for row in parts["engines"]["rows"])
    assert 9 == sum(row.get("ms", 0) > 0 for row in parts["adapters"]["rows"])


@pytest.mark.slow
def test_the_results_and_a_table_for_each_part_are_in_the_folder(results):
    folder, written = results
    assert written == json.loads((folder / "out" / "results.json").read_text())
    headings = [line for line in (folder / "out" / "tables.md").read_text().splitlines() if line.startswith("## ")]
    assert len(written["parts"]) == len(headings)


def test_without_a_gpu_it_says_so_and_ends(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ran = subprocess.run([sys.executable, str(SCRIPT), "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert (1, "gpu_all.py needs a GPU: torch finds no GPU; --device cpu is a dry run") == (ran.returncode, ran.stderr.strip())


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_all", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_case_that_fails_or_crashes_costs_itself_alone(script, tmp_path, monkeypatch):
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "breaking.py").write_text(PART)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = script.part("breaking", argparse.Namespace(device="cpu", quick=False), tmp_path, time.monotonic() + 600)
    statuses = ["ok", "failed", "failed", "failed", "failed", "absent", "ok"]
    assert statuses == [row["status"] for row in result["rows"]]
    reasons = [row.get("why", "") for row in result["rows"]]
    assert ["ValueError: a wrong turn", "its process ended with status 7"] == reasons[1:3]
    assert ["the error is above its limit"] * 2 + ["needs luck"] == reasons[3:6]
    assert "failed" == result["status"]
    assert "a wrong turn" in result["log"]


def test_a_part_that_cannot_begin_has_failed(script, tmp_path):
    result = script.part("nowhere", argparse.Namespace(device="cpu", quick=False), tmp_path, time.monotonic() + 600)
    assert ("failed", []) == (result["status"], result["rows"])
    assert "No module named 'gpu.nowhere'" in result["log"]


@pytest.fixture
def hanging():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as process:
        yield process
        process.kill()


def test_what_hangs_is_cut_off(script, hanging, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "CASE_S", 0.2)
    why, lost = script.watch(hanging, tmp_path / "none", time.monotonic() + 600)
    assert ("", "it was cut off: nothing was heard for 0.2 s") == (why, lost)
    script.end(hanging)
    assert hanging.returncode is not None


def test_what_takes_all_the_time_is_cut_off(script, hanging, tmp_path):
    assert "no time left" == script.watch(hanging, tmp_path / "none", time.monotonic())[0]


def test_a_part_for_which_there_is_no_time_is_not_run(tmp_path):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--minutes", "0", "--out", str(tmp_path)]
    subprocess.run(command, capture_output=True, check=False)
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert {"not run"} == {part["status"] for part in parts.values()}


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(
    "part", ["facts", "attention", "models", "transfer", "operators", "steps", "adapters", "engines", "striped", "theirs"]
)
def test_the_cases_of_a_gpu_have_names_of_their_own(monkeypatch, part, quick):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    names = [name for name, _ in importlib.import_module(f"gpu.{part}").cases("cuda", quick)]
    assert len(set(names)) == len(names) > 0


def test_an_iteration_on_a_known_device_is_predicted(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from gpu import steps

    from stallfree.perf import hardware
    from stallfree.perf.shape import load

    side = steps.Side(load("llama3-8b"))
    for device in ("h100", "h200"):
        sheet = hardware.load(device)
        for decodes, chunk in steps.SHAPES.values():
            least = steps.least(side, decodes, chunk, sheet.bandwidth, sheet.peak["fp16"])
            predicted = steps.predicted(side, side.shape(decodes, chunk), sheet)
            assert least < predicted < 3 * least
