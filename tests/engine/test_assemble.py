"""What an executor is given where the user leaves it open: threads and memory within the container's limits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from stallfree.checkpoint import Checkpoint, ModelConfig
from stallfree.engine import assemble, formats
from stallfree.engine.assemble import Options, calibration_key, completed
from stallfree.executors.openvino.trial import Graph
from tests.machines import GIB, container, pretend

CONFIG = ModelConfig(
    family="llama", num_layers=16, hidden_size=2048, num_heads=32, num_kv_heads=8, head_dim=64, ffn_size=8192, vocab_size=32000,
    max_model_len=8192, norm_eps=1e-5, inv_freq=(1.0,) * 32, windows=(0,) * 16,
)  # fmt: skip
GIVEN = Options(weights="int8")


@pytest.fixture
def checkpoint(tmp_path) -> Checkpoint:
    """A model of 1.1 billion weights, of which nothing can be read."""
    (tmp_path / "large.gguf").write_bytes(b"")
    return Checkpoint(tmp_path / "large.gguf", CONFIG, lambda name: pytest.fail(f"{name} is read"), {})


def test_openvino_chooses_threads_itself_unless_a_quota_is_below_the_cores(checkpoint, tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch, cores=4, smt=2)
    assert None is completed(GIVEN, checkpoint).threads
    pretend(tmp_path, monkeypatch, cores=4, smt=2, files=container(cpu="600000 100000"))
    assert None is completed(GIVEN, checkpoint).threads
    pretend(tmp_path, monkeypatch, cores=4, smt=2, files=container(cpu="350000 100000"))
    assert 3 == completed(GIVEN, checkpoint).threads


def test_threads_and_memory_that_the_user_gives_are_taken(checkpoint, tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch, files=container(cpu="100000 100000", memory=2 * GIB))
    options = completed(Options(weights="int8", threads=7, kv_memory=GIB), checkpoint)
    assert (7, GIB) == (options.threads, options.kv_memory)


def test_a_container_of_2_gib_on_a_large_machine_gets_less_than_2_gib_of_kv(checkpoint, tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch, memory=24 * GIB, free=20 * GIB, files=container(memory=2 * GIB))
    assert GIB // 2 == completed(GIVEN, checkpoint).kv_memory


def test_ranks_on_a_processor_share_the_default_memory(checkpoint, tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch, files=container(memory=8 * GIB))
    options = completed(Options(executor="torch", device="cpu", weights="int8", tp=2), checkpoint)
    assert (GIB, None) == (options.kv_memory, options.threads)


def test_what_the_weights_of_each_group_of_ranks_leave_is_the_default_memory(checkpoint, tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch, files=container(memory=3 * GIB))
    one, two = (completed(Options(executor="torch", device="cpu", weights="int8", sp=sp), checkpoint) for sp in (1, 2))
    assert 3 * GIB // 4 == one.kv_memory
    assert 0 < two.kv_memory < GIB // 3  # 0.9 of 3 GiB, without 1.09 GiB twice, for each of two


@pytest.mark.parametrize(
    ("mib", "kv", "wanted", "packs"),
    [(1, "u8", False, "now"), (257, "u8", True, "later"), (257, "u8", False, "never"), (257, "f32", False, "now")],
)
def test_only_large_models_are_ready_before_their_weights_are_packed(mib, kv, wanted, packs, checkpoint, monkeypatch):
    with checkpoint.path.open("r+b") as file:
        file.truncate(mib << 20)
    given: dict[str, object] = {}
    monkeypatch.setattr("stallfree.executors.openvino.OpenVINOExecutor", lambda _, **options: given.update(options))
    monkeypatch.setattr(formats, "graph_tried", lambda *_: Graph(wanted, "it was tried"))
    large, options = replace(checkpoint, files=(checkpoint.path,)), replace(GIVEN, kv=kv, kv_memory=GIB)
    assemble._openvino(large, options, lambda stage: None, lambda done, of: None)
    assert given["packs"] == packs
    assert (given["folder"] is not None) == (mib > 32)


def test_the_calibration_of_another_way_is_another(checkpoint, monkeypatch):
    options = completed(GIVEN, checkpoint)
    before = calibration_key(options, checkpoint.path, 8192)
    for wanted in (True, False):
        monkeypatch.setattr(formats, "graph", lambda *_, wanted=wanted: Graph(wanted, "it was tried"))
        assert (before == calibration_key(options, checkpoint.path, 8192)) is wanted


@pytest.mark.parametrize("name", ["tp", "sp", "pp"])
def test_fewer_than_one_rank_of_a_kind_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
        Options(executor="torch", **{name: 0})


@pytest.mark.parametrize(
    "other", [{"cores": 2}, {"flags": "avx2"}, {"files": container(cpu="100000 100000")}, {"files": container(cpu="200000 100000")}]
)
def test_another_processor_or_quota_is_calibrated_anew(checkpoint, tmp_path, monkeypatch, other):
    pretend(tmp_path, monkeypatch, cores=4)
    key = calibration_key(completed(GIVEN, checkpoint), checkpoint.path, 8192)
    pretend(tmp_path, monkeypatch, cores=4)
    assert key == calibration_key(completed(GIVEN, checkpoint), checkpoint.path, 8192)
    assert key == json.loads(json.dumps(key))
    pretend(tmp_path, monkeypatch, **{"cores": 4, **other})
    assert key != calibration_key(completed(GIVEN, checkpoint), checkpoint.path, 8192)


def test_more_threads_than_a_socket_has_cores_are_a_warning(checkpoint, tmp_path, monkeypatch):
    def make(*_: object) -> None:
        raise ValueError("as far as here")

    pretend(tmp_path, monkeypatch, sockets=2, cores=4)
    monkeypatch.setattr(assemble, "locate", lambda *_: Path("large.gguf"))
    monkeypatch.setattr(assemble, "open_checkpoint", lambda _: checkpoint)
    monkeypatch.setattr(assemble.Text, "from_gguf", lambda *_: None)
    monkeypatch.setitem(assemble.MAKERS, "openvino", (make, "int8", "u8"))
    lines: list[str] = []
    for threads, warnings in ((4, 0), (6, 1)):
        with pytest.raises(ValueError, match="as far as here"):
            assemble.assemble(Options(weights="int8", threads=threads), say=lines.append)
        assert warnings == len(lines)
    assert lines[0].startswith("warning: 6 threads are more than the 4 cores of a socket")
