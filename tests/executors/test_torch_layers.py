"""The torch executor tells how many layers are computed, and moves the KV of single layers; on a GPU it reads them aside."""

import threading

import numpy as np
import pytest

from stallfree.checkpoint import open_checkpoint
from stallfree.core.plan import Plan
from stallfree.executors.base import MovesLayers
from tests.executors.test_openvino import TOKENS, work
from tests.executors.test_torch import EXACT, FAMILIES, KV, blocks
from tests.models import write_folder
from tests.waiting import PATIENCE_S

torch = pytest.importorskip("torch")

from stallfree.executors.torch import ParallelExecutor, TorchExecutor  # noqa: E402
from stallfree.executors.torch.reader import Reader  # noqa: E402


@pytest.fixture(scope="module")
def executor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    write_folder(folder, "llama")
    return TorchExecutor(open_checkpoint(folder), EXACT, KV)


def read(executor, numbers, layers=None) -> bytearray:
    """The KV of some layers, or of all."""
    size = len(numbers) * executor.block_bytes
    memory = bytearray(size if layers is None else size // executor.num_layers * len(layers))
    if layers is None:
        executor.read_blocks(numbers, memoryview(memory))
    else:
        executor.read_layers(numbers, layers, memoryview(memory)).result()
    return memory


@pytest.mark.parametrize("name", ["llama", "falcon", "falcon 7b", "gemma3", "mixtral", "gpt oss"])
def test_the_kv_of_a_layer_is_complete_when_its_followers_are_told(name, tmp_path):
    """With two requests, of which one is followed."""
    family, config = FAMILIES[name]
    write_folder(tmp_path, family, **config)
    executor = TorchExecutor(open_checkpoint(tmp_path), EXACT, KV)
    seen, own = [], blocks(work(TOKENS, id="own"), 0)
    table = own.blocks[: len(TOKENS) // 16]
    executor.follow("own", lambda w, layers: seen.append((w, layers, read(executor, table, range(layers - 1, layers)))))
    executor.submit(Plan(0, 0.0, (blocks(work(TOKENS[:40], id="other"), 3), own)))
    executor.collect()
    assert [(own, layer + 1) for layer in range(executor.num_layers)] == [each[:2] for each in seen]
    assert read(executor, table) == b"".join(kv for _, _, kv in seen)


def test_nobody_is_told_after_the_end(executor):
    seen = []
    executor.follow("a", lambda w, layers: seen.append(layers))
    executor.follow("a", None)
    executor.follow("a", None)
    executor.submit(Plan(0, 0.0, (blocks(work(TOKENS, id="a")),)))
    executor.collect()
    assert [] == seen


def test_layers_that_are_read_can_be_written_elsewhere(executor):
    executor.submit(Plan(0, 0.0, (blocks(work(TOKENS, id="a")),)))
    executor.collect()
    source, target = (0, 1, 2), (9, 3, 5)
    before = read(executor, target)
    executor.write_layers(target, range(1, 3), memoryview(read(executor, source, range(1, 3))))
    layer = len(before) // executor.num_layers
    assert before[:layer] == read(executor, target)[:layer]
    executor.write_layers(target, range(1), memoryview(read(executor, source, range(1))))
    assert read(executor, source) == read(executor, target)


def test_one_process_moves_layers_and_several_ranks_do_not(executor):
    assert isinstance(executor, MovesLayers)
    assert not hasattr(ParallelExecutor, "follow")


class FakeStream:
    """A stream of a GPU: what is launched in it runs once the events that it waits for have come."""

    def __init__(self, device):
        pass

    def wait_event(self, event):
        event.awaited.set()
        event.come.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class FakeEvent:
    """An event of a GPU, which comes when the test says so; one of the reader's own stream at once."""

    def __init__(self, blocking=False):
        self.awaited, self.come = threading.Event(), threading.Event()
        self.blocking = blocking

    def record(self, stream):
        self.stream = stream

    def synchronize(self):
        assert self.blocking


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU: `torch.cuda`'s streams and events. Gives the events of the computing stream."""
    events = []

    def made(**options):
        event = FakeEvent(**options)
        if not event.blocking:
            events.append(event)
        return event

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", made)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "computing")
    return events


def test_on_a_gpu_a_layer_is_read_once_it_is_computed_and_nobody_waits_for_that(gpu):
    reader, keys, values = Reader("cuda"), torch.zeros(4, 8, dtype=torch.uint8), torch.zeros(4, 8, dtype=torch.uint8)
    memories = bytearray(32), bytearray(16)
    first = reader.read([keys, values], [3, 1], memoryview(memories[0]))
    second = reader.read([values], [0, 2], memoryview(memories[1]))
    assert ["computing"] * 2 == [event.stream for event in gpu]
    assert gpu[0].awaited.wait(PATIENCE_S)
    assert not first.done()
    keys[:] = torch.arange(32, dtype=torch.uint8).view(4, 8)
    values[:] = 100 + keys
    gpu[0].come.set()
    first.result(PATIENCE_S)
    assert gpu[1].awaited.wait(PATIENCE_S)
    assert not second.done()
    gpu[1].come.set()
    second.result(PATIENCE_S)
    reader.close()
    expected = np.arange(32, dtype=np.uint8).reshape(4, 8)
    assert b"".join(part.tobytes() for part in (expected[[3, 1]], 100 + expected[[3, 1]])) == memories[0]
    assert (100 + expected[[0, 2]]).tobytes() == memories[1]


def test_an_error_on_a_gpu_is_the_readers_and_the_next_read_works(gpu):
    reader, keys, memory = Reader("cuda"), torch.ones(4, 8, dtype=torch.uint8), bytearray(8)
    reads = [reader.read([keys], [number], memoryview(memory)) for number in (9, 2)]
    for event in gpu:
        event.come.set()
    with pytest.raises(IndexError):
        reads[0].result(PATIENCE_S)
    reads[1].result(PATIENCE_S)
    reader.close()
    assert b"\1" * 8 == memory
