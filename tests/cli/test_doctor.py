"""`stallfree doctor` as a user sees it, on pretended machines: without a network, with and without a model."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from stallfree.checkpoint import ModelConfig, open_checkpoint
from stallfree.core.plan import Capacity
from stallfree.engine import calibrate
from stallfree.engine.assemble import Options, calibration_key, completed
from stallfree.perf.fitted import Fitted
from tests.machines import GIB, container, pretend

VALUES = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}
"""config.json of a model of 1.1 billion weights."""


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder with an empty cache; nothing can be fetched."""
    home = tmp_path / "home" / "somebody"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("STALLFREE_CACHE", str(home / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("STALLFREE_API_KEY", "sk-hidden")
    return home


@pytest.fixture
def model(home) -> Path:
    """A folder with the model's headers. Its weights are a hole in the file, so they take no disk."""
    folder = home / "models" / "large"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(VALUES))
    config = ModelConfig(
        family="llama", num_layers=16, hidden_size=2048, num_heads=32, num_kv_heads=8, head_dim=64, ffn_size=8192,
        vocab_size=32000, max_model_len=8192, norm_eps=1e-5, inv_freq=(1.0,) * 32, windows=(0,) * 16,
    )  # fmt: skip
    header, at = {}, 0
    for name, shape in config.tensors().items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (at, at + size)}
        at += size
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)
    return folder


@pytest.fixture
def doctor(stallfree) -> Callable[..., tuple[object, dict]]:
    """The exit code and the report of `stallfree doctor --json`."""

    def run(*arguments: str) -> tuple[object, dict]:
        code, out, _ = stallfree("doctor", *arguments, "--json")
        return code, json.loads(out)

    return run


def test_it_works_without_a_model_and_says_how_to_get_one(home, stallfree):
    code, out, _ = stallfree("doctor")
    assert 0 == code
    assert "not fetched; `stallfree models pull smollm2-135m-instruct` fetches it" in out
    assert all(f"\n{title}\n" in out for title in ("versions", "machine", "model", "findings", "prevents"))


def test_it_says_what_is_chosen_and_what_the_model_takes(home, model, tmp_path, monkeypatch, stallfree):
    pretend(tmp_path, monkeypatch, sockets=1, cores=8, smt=2, free=8 * GIB)
    code, out, _ = stallfree("doctor", str(model))
    assert 0 == code
    rows = {line.split("  ")[1]: line for line in out.splitlines() if line.startswith("  ") and "  " in line[2:]}
    assert "16 processors, 2 a core, on 1 socket; 1 NUMA node" in rows["has"]
    assert "8 " in rows["threads"]
    assert "2.00 GiB" in rows["KV memory"]
    assert "a quarter of the free memory" in rows["KV memory"]
    assert "1.09 GiB for weights, 2.00 GiB for KV, of 8.00 GiB that are free" in rows["takes"]
    assert "llama, 1,104 million weights, at most 8,192 tokens" in rows["is"]
    assert "not calibrated" in out


def test_nothing_private_is_in_it(home, model, stallfree):
    for arguments in ((str(model),), (str(model), "--json"), ()):
        _, out, err = stallfree("doctor", *arguments)
        assert "somebody" not in out + err
        assert "sk-hidden" not in out + err


def test_a_remembered_calibration_is_the_price(home, model, tmp_path, monkeypatch, doctor):
    pretend(tmp_path, monkeypatch, free=8 * GIB)
    options = completed(Options(str(model)), checkpoint := open_checkpoint(model))
    cost = Fitted((0.01, 0.02, 0.0, 0.0, 0.0, 0.0))
    key = calibration_key(options, checkpoint.path, 8192)
    calibrate.remember(cost, cost.errors([([(0, 1)], 0.01)]), key, home / "cache" / "calibration", Capacity(32, 10, 8192))
    code, report = doctor(str(model))
    assert 0 == code
    costs = report["costs"]
    assert [cost.seconds(shape) for shape in ([(512, 1)], [(512, 1)] * 16, [(0, 512)])] == pytest.approx(
        [*costs["seconds"].values()]
    )
    assert 512 / cost.seconds([(0, 512)]) == pytest.approx(costs["prefill_tokens_per_s"])
    assert "tbt=" in report["chosen"]["slo"]["value"]
    code, report = doctor(str(model), "--kv", "f32")
    assert {} == report["costs"]


def test_a_small_container_gets_a_small_kv_cache_and_few_threads(home, model, tmp_path, monkeypatch, doctor):
    pretend(tmp_path, monkeypatch, free=20 * GIB, files=container(cpu="250000 100000", memory=2 * GIB))
    code, report = doctor(str(model))
    assert 0 == code
    assert GIB // 2 == report["chosen"]["kv_memory"]["value"]
    assert {"value": 2, "why": "the whole processors that /sys/fs/cgroup/cpu.max allows"} == report["chosen"]["threads"]
    assert any("/sys/fs/cgroup/cpu.max allows 2.5 of the 4 processors" in text for text in report["findings"])


def test_a_model_that_does_not_fit_prevents_serving(home, model, tmp_path, monkeypatch, doctor):
    pretend(tmp_path, monkeypatch, files=container(memory=GIB))
    code, report = doctor(str(model))
    assert 1 == code
    (why,) = report["prevents"]
    assert "large does not fit: int8 weights take 1.09 GiB" in why
    assert "/sys/fs/cgroup/memory.max allows 1.00 GiB" in why
    assert "take a model of at most" in why


def test_a_server_refuses_it_before_it_loads(home, model, tmp_path, monkeypatch, stallfree):
    (model / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}')
    (model / "tokenizer_config.json").write_text("{}")
    pretend(tmp_path, monkeypatch, files=container(memory=GIB))
    code, _, err = stallfree("generate", "x", "--model", str(model))
    assert 1 == code
    assert "error: large does not fit: int8 weights take 1.09 GiB" in err


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"proc/loadavg": "3.5 1 1 1/1 1"}, "in the last minute 3.5 threads ran or waited, on 4 processors"),
        ({"sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]"}, "transparent huge pages are off"),
        (
            {
                f"sys/devices/system/cpu/cpu0/cpufreq/scaling_{key}": text
                for key, text in (("driver", "acpi-cpufreq"), ("governor", "powersave"))
            },
            "acpi-cpufreq powersave, the lowest frequency",
        ),
    ],
)
def test_what_makes_the_machine_slow_is_found(home, tmp_path, monkeypatch, doctor, files, says):
    pretend(tmp_path, monkeypatch, files=files)
    code, report = doctor()
    assert 0 == code
    assert any(says in text for text in report["findings"])


def test_a_quiet_machine_has_no_findings(home, tmp_path, monkeypatch, doctor):
    pretend(tmp_path, monkeypatch)
    assert [] == doctor()[1]["findings"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--threads", "6"), "6 threads are more than the 4 cores of a socket"),
        (("--kv-memory", "100MiB"), "tokens of a sequence, which may have 8,192; longer ones are refused"),
        (("--kv-memory", "6.5GiB"), "of the free memory, which leaves little for the runtime; give --kv-memory"),
        (("--weights", "f32", "--kv", "u8", "--kv-memory", "1GiB"), "multiplies in bf16, and f32 was chosen"),
    ],
)
def test_options_that_make_it_slow_or_risky_are_found(home, model, tmp_path, monkeypatch, doctor, arguments, says):
    pretend(tmp_path, monkeypatch, sockets=2, free=8 * GIB)
    monkeypatch.setattr("stallfree.executors.openvino.recipe.has_bf16", lambda: True)
    code, report = doctor(str(model), *arguments)
    assert 0 == code
    assert any(says in text for text in report["findings"])
    assert any("4 cores of one socket; start one for each socket" in text for text in report["findings"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere.gguf",), "no model at 'nowhere.gguf'"),
        (("--executor", "openvin"), "unknown executor 'openvin' (did you mean 'openvino'?)"),
    ],
)
def test_what_cannot_be_served_prevents_serving(home, doctor, arguments, says):
    code, report = doctor(*arguments)
    assert 1 == code
    assert says in report["prevents"][0]


def test_a_full_disk_prevents_fetching(home, monkeypatch, doctor):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    code, report = doctor()
    assert 1 == code
    assert "has 0 MB free; fetching needs 216 MB for a moment" in report["prevents"][0]
    assert "calibrations may not be kept" in report["findings"][-1]


def test_bad_options_of_the_executor_prevent_serving(home, model, doctor):
    code, report = doctor(str(model), "--weights", "fp8")
    assert 1 == code
    assert "weights 'fp8' is unknown" in report["prevents"][0]


def test_the_simulated_executor_needs_no_model(home, monkeypatch, stallfree):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    code, out, _ = stallfree("doctor", "--executor", "simulated")
    assert 0 == code
    assert "none; the executor sleeps as a cost model says" in out


def test_torch_is_asked_as_openvino_is(home, model, tmp_path, monkeypatch, doctor):
    pretend(tmp_path, monkeypatch, cores=3, free=8 * GIB)
    code, report = doctor(str(model), "--executor", "torch", "--device", "cpu")
    assert 0 == code
    chosen = {name: choice["value"] for name, choice in report["chosen"].items()}
    assert ("bf16", "bf16", "bf16", 3) == tuple(chosen[name] for name in ("weights", "kv", "arithmetic", "threads"))
    assert pytest.approx(2 * report["model"]["parameters"], rel=0.01) == report["memory"]["weights"]


def test_a_disk_without_room_for_converted_weights_is_found(home, model, tmp_path, monkeypatch, doctor):
    pretend(tmp_path, monkeypatch, free=8 * GIB)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": GIB})())
    code, report = doctor(str(model))
    assert 0 == code
    told = "has 1074 MB free, and converted weights take 1173 MB, so every start converts them again"
    assert any(told in text for text in report["findings"])


def test_another_version_of_the_runtime_is_found(home, monkeypatch, doctor):
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["numpy==1.0", "numpy>=1; extra == 'test'"])
    _, report = doctor()
    assert any("and this release was made with 1.0; pip install numpy==1.0" in text for text in report["findings"])
