"""Which package may import which: the layers, checked by every file's imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "stallfree"
STDLIB = set(sys.stdlib_module_names)
# Package -> (packages of ours, libraries) that it may import when loaded or later. `cli` is free, and lazy.
ALLOWED = {
    "core": ({"core"}, set()),
    "policies": ({"core", "perf", "policies", "qos"}, set()),
    "qos": ({"core", "qos"}, set()),
    "perf": ({"core", "checkpoint", "perf"}, set()),
    "checkpoint": ({"checkpoint"}, {"gguf", "huggingface_hub", "numpy"}),
    "parsers": ({"parsers"}, set()),
    "executors": (
        {"core", "checkpoint", "executors"},
        {"flashinfer", "llvmlite", "msgpack", "numba", "numpy", "openvino", "ray", "torch", "triton"},
    ),
    "proposers": ({"core", "executors", "proposers"}, set()),
    "engine": (
        {"core", "elastic", "perf", "policies", "proposers", "qos", "checkpoint", "engine", "executors"},
        {"jinja2", "tokenizers"},
    ),
    "transfer": ({"core", "engine", "executors", "transfer"}, {"numpy"}),
    "metrics": ({"core", "metrics"}, {"matplotlib", "numpy"}),
    "workload": ({"workload"}, {"numpy"}),
    "bench": ({"core", "metrics", "workload", "bench"}, {"aiohttp", "numpy"}),
    "elastic": ({"core", "elastic"}, set()),
    "sim": ({"core", "elastic", "policies", "perf", "qos", "processes", "workload", "metrics", "sim"}, set()),
    "papers": ({"core", "metrics", "sim", "workload", "papers"}, set()),
    "planner": ({"core", "elastic", "metrics", "perf", "sim", "workload", "planner"}, set()),
    "vllm": (
        {"core", "checkpoint", "engine", "metrics", "perf", "policies", "qos", "sim", "vllm"},
        {"prometheus_client", "torch", "vllm"},
    ),
    "grammar": ({"engine", "executors", "grammar", "parsers", "processes"}, {"llguidance", "numpy"}),
    "server": (
        {"core", "engine", "executors", "grammar", "parsers", "transfer", "metrics", "processes", "server"},
        {"aiohttp", "fastapi", "opentelemetry", "prometheus_client", "pydantic", "pydantic_core", "ray", "starlette", "uvicorn"},
    ),
}  # fmt: skip


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def test_every_package_has_its_layer():
    assert {file.parent.name for file in ROOT.glob("*/__init__.py")} == {*ALLOWED, "cli"}


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_its_layer_allows(package):
    layers, libraries = ALLOWED[package]
    for file in (ROOT / package).rglob("*.py"):
        for name in imports(file):
            top, *rest = name.split(".")
            if top == "stallfree":
                assert not rest or rest[0] in layers, f"{file} imports {name}"
            else:
                assert top in STDLIB | libraries, f"{file} imports {name}"


def test_no_module_of_core_knows_a_clock_log_random_number_or_thread():
    files = list((ROOT / "core").rglob("*.py"))
    assert files
    unknown = {"asyncio", "concurrent", "datetime", "logging", "multiprocessing", "random", "secrets", "threading", "time", "uuid"}
    for file in files:
        assert {name.partition(".")[0] for name in imports(file)}.isdisjoint(unknown), file


def test_importing_the_package_loads_neither_runtime_nor_server():
    heavy = "{'torch', 'openvino', 'numpy', 'fastapi', 'aiohttp'}"
    code = f"import sys, stallfree, stallfree.cli; print(sorted({heavy} & set(sys.modules)))"
    assert "[]" == subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
