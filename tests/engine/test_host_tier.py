"""Cached prefixes outlive the KV cache in host memory, and the engine in a file: the same tokens, and never another's."""

import json
from dataclasses import replace

import numpy as np
import pytest

from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity
from stallfree.core.record import Fingerprints, Run, read
from stallfree.core.request import Request
from stallfree.engine import host_tier
from stallfree.engine.adapters import Library
from stallfree.engine.assemble import Options, assemble, bytes_as_text
from stallfree.engine.engine import Engine
from stallfree.engine.host_tier import HostTier
from stallfree.engine.saved_kv import SavedKV, check
from stallfree.executors.base import Lost
from stallfree.executors.openvino import OpenVINOExecutor
from stallfree.executors.sampling import Sampling
from stallfree.executors.simulated import Linear, SimulatedExecutor
from stallfree.policies import load
from stallfree.sim.replay import difference, replayed
from tests.adapters import made_adapter
from tests.adapting import Adapting
from tests.checkpoint.test_adapter import CONFIG
from tests.engine.test_engine import Parrot
from tests.executors import test_contract

TEXT = bytes_as_text()
GREEDY = Sampling(temperature=0)
BLOCKS = 14
tiny = test_contract.tiny


def real(kind: str, tiny, blocks: int):
    """An executor of random weights in f32 with so many KV blocks."""
    if kind != "openvino":
        torch = pytest.importorskip("stallfree.executors.torch", exc_type=ImportError)
        options = torch.Options("f32", "f32", max_model_len=400)
        size = blocks * torch.TorchExecutor(tiny, options, 1 << 20).block_bytes
        if kind in ("ranks", "stages"):
            tp, pp = (2, 1) if kind == "ranks" else (1, 2)
            return torch.ParallelExecutor(tiny, options, size // 2, tp=tp, pp=pp, workers=torch.workers("local"))
        return torch.TorchExecutor(tiny, options, size, overlap=kind == "overlap")
    one = OpenVINOExecutor(tiny, weights="f32", kv="f32", kv_bytes=1 << 20, max_model_len=400)
    return OpenVINOExecutor(tiny, weights="f32", kv="f32", kv_bytes=blocks * one.block_bytes, max_model_len=400)


def engine(executor, host_blocks: int = 0, **options) -> Engine:
    made = Engine(executor, TEXT, load("sarathi", token_budget=64), Limits(8, 512), **options)
    if host_blocks:
        made.host = HostTier(executor, made.scheduler.ledger.pool, host_blocks * executor.block_bytes, in_host=True)
    return made


def prompts(size: int) -> list[list[int]]:
    """Conversations in turn: each goes on where it was, after so many others that it was evicted."""
    rng = np.random.default_rng(3)
    base = [rng.integers(0, 256, 4 * size + 3).tolist() for _ in range(4)]
    return [base[i % 4] + rng.integers(0, 256, (size // 2) * (i // 4)).tolist() for i in range(12)]


def serve(engine: Engine, prompts, **fields) -> list[list[int]]:
    """The outputs, two requests at a time."""
    requests = [Request(f"r{i}", prompt, 5, sampling=GREEDY, arrival=i, **fields) for i, prompt in enumerate(prompts)]
    waiting = list(requests)
    while waiting or engine.busy:
        while waiting and len(engine.scheduler.ledger.requests) < 2:
            engine.submit(waiting.pop(0))
        engine.step()
        if engine.waits:
            engine.adapters.join()
        engine.scheduler.ledger.check()
    return [request.output for request in requests]


KINDS = ["openvino", "overlap", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("ranks", "stages"))]


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_those_of_an_engine_that_evicts_nothing(tiny, kind, monkeypatch):
    roomy = engine(real("openvino" if kind == "openvino" else "torch", tiny, 200))
    small = engine(real(kind, tiny, BLOCKS), 100)
    monkeypatch.setattr(host_tier, "MOST_MOVED", 3 * small.executor.block_bytes)
    bounded = engine(real(kind, tiny, BLOCKS), 100)
    records = []
    small.record = bounded.record = records.append
    asked = prompts(small.executor.capacity.block_size)
    expected = serve(roomy, asked)
    for other in (small, bounded):
        records.clear()
        assert expected == serve(other, asked)
        assert sum(tokens for record in records for _, tokens in record.restored)
        other.close()
    assert 3 == bounded.host.index.most
    roomy.close()


def simulated(blocks: int = BLOCKS) -> SimulatedExecutor:
    executor = SimulatedExecutor(Capacity(16, blocks, 400), range(256), Linear(1e-6, 0.0, 0.0))
    executor.sleep = lambda seconds: None
    return executor


def test_a_replay_brings_back_what_the_run_brought_back():
    records = []
    made = engine(simulated(), 30, record=records.append, prints=Fingerprints(16, b"key"))
    serve(made, prompts(16))
    index = made.host.index
    capacity, options = made.executor.capacity, {"token_budget": 64}
    run = Run("sarathi", capacity, Limits(8, 512), options=options, host_blocks=index.num_slots, host_moves=index.most)
    run, again = read([run.to_json(), *(record.to_json() for record in records)])
    assert any(record.restored for record in again)
    assert difference(run, again) is None
    assert difference(replace(run, host_blocks=0), again) is not None


def test_a_run_that_began_with_saved_kv_is_not_replayed():
    with pytest.raises(ValueError, match="began with 7 KV blocks from a file"):
        list(replayed(Run("sarathi", Capacity(16, 10, 100), Limits(), saved_blocks=7), []))


class Faulty(SimulatedExecutor):
    """It cannot write KV once."""

    fault: Exception | None = None

    def write_blocks(self, blocks, memory):
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault


@pytest.mark.parametrize("restart", [False, True])
def test_if_kv_cannot_be_moved_all_of_it_is_lost_and_the_next_requests_are_served(restart):
    executor = Faulty(Capacity(16, BLOCKS, 400), range(256), Linear(1e-6, 0.0, 0.0))
    made = engine(executor, 30, restart=restart)
    serve(made, prompts(16)[:4])
    executor.fault = OSError("no such memory")
    made.submit(Request("a", prompts(16)[0] + [1], 3, sampling=GREEDY))
    outputs = [output for _ in range(9) if made.busy for output in made.step()]
    made.scheduler.ledger.check()
    assert executor.fault is None
    if restart:
        assert "length" == outputs[-1].finish_reason
    else:
        assert "no such memory" in outputs[-1].error
    assert 2 == len(serve(made, prompts(16)[:2]))


def test_after_a_worker_was_lost_nothing_of_before_comes_back():
    class Losing(SimulatedExecutor):
        lose = False

        def submit(self, plan):
            if self.lose:
                self.lose = False
                raise Lost("rank 1 is gone")
            super().submit(plan)

    executor = Losing(Capacity(16, BLOCKS, 400), range(256), Linear(1e-6, 0.0, 0.0))
    made = engine(executor, 30, restart=True)
    serve(made, prompts(16)[:6])
    assert len(made.host.index)
    executor.lose = True
    assert 12 == len(serve(made, prompts(16)))
    made.scheduler.ledger.check()


class Watched(Adapting):
    """It notes which blocks are read, and which an adapter is written to."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.events = []

    def read_blocks(self, blocks, memory):
        self.events.append(("read", *blocks))
        super().read_blocks(blocks, memory)

    def load_adapter(self, key, adapter, blocks):
        self.events += [("write", block) for block in blocks]
        super().load_adapter(key, adapter, blocks)


def with_adapter(folder, seed: int, blocks: int = 8) -> Engine:
    """An engine with host memory and an adapter named dutch, of other contents with another `seed`."""
    made = engine(Watched(Capacity(16, blocks, 400), range(256), Linear(0.0, 0.0, 0.0)), 30)
    library = Library(made.adapters, CONFIG)
    library.add("dutch", library.open("dutch", made_adapter(folder / f"adapter {seed}", CONFIG, rank=8, seed=seed)))
    return made


def test_what_an_adapter_evicts_is_kept_before_its_weights_are_written(tmp_path):
    made = with_adapter(tmp_path, 1)
    serve(made, [list(range(8 * 16 - 6))])
    made.executor.events.clear()
    serve(made, [[1] * 20], adapter="dutch")
    written = [block for kind, block in made.executor.events if kind == "write"]
    first = {block: made.executor.events.index(("read", block)) for block in written if ("read", block) in made.executor.events}
    assert first
    assert all(at < made.executor.events.index(("write", block)) for block, at in first.items())
    made.close()


def test_prefixes_of_an_adapter_come_back_for_one_with_the_same_contents(tmp_path):
    first, same, other = (with_adapter(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    serve(first, [list(range(50))], adapter="dutch")
    assert 3 == saved(first, tmp_path / "kv")
    assert 3 == restored(same, tmp_path / "kv").blocks
    assert 48 == same.scheduler.ledger.pool.look(Request("a", range(50), 1, adapter="dutch"))
    back = restored(other, tmp_path / "kv")
    assert 0 == back.blocks
    assert "no adapter, for 3 more" in back.note
    for made in (first, same, other):
        made.close()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kv_host_memory": 100}, "less than one KV block"),
        ({"kv_host_memory": 1 << 60}, "of this machine's memory .* are left beside the model"),
        ({"kv_host_memory": 1 << 20, "prefix_cache": False}, "leave out --no-prefix-cache"),
    ],
)
def test_host_memory_that_cannot_be_used_is_refused(values, says):
    with pytest.raises((ValueError, MemoryError), match=says):
        assemble(Options(executor="simulated", policy="sarathi", **values))


def test_an_executor_whose_kv_cannot_be_moved_has_no_host_memory():
    with pytest.raises(ValueError, match="Parrot has no KV that can be moved"):
        HostTier(Parrot(), engine(simulated()).scheduler.ledger.pool, 1 << 20, in_host=True)


# The file


def saved(made: Engine, file) -> int:
    return SavedKV(file, made, "a model").save()


def restored(made: Engine, file, model: str = "a model"):
    return SavedKV(file, made, model).restore()


@pytest.mark.parametrize("kind", ["openvino", "torch"])
def test_after_a_restart_the_prefixes_are_there_with_the_same_tokens(tiny, kind, tmp_path):
    first, second = engine(real(kind, tiny, BLOCKS), 40), engine(real(kind, tiny, BLOCKS), 40)
    asked = prompts(first.executor.capacity.block_size)
    expected = serve(first, asked)
    number = saved(first, tmp_path / "kv")
    records = []
    second.record = records.append
    assert number == restored(second, tmp_path / "kv").blocks > BLOCKS
    second.scheduler.ledger.check()
    assert expected == serve(second, asked)
    assert sum(tokens for record in records for _, tokens in record.cached) > sum(map(len, asked)) / 2
    assert "100600" == oct((tmp_path / "kv").stat().st_mode)[2:]


def test_a_smaller_engine_takes_what_it_has_room_for(tmp_path):
    first, second = engine(simulated(), 40), engine(simulated(6))
    serve(first, prompts(16))
    saved(first, tmp_path / "kv")
    back = restored(second, tmp_path / "kv")
    assert 6 == back.blocks
    assert "there is no room" in back.note
    second.scheduler.ledger.check()


def test_salts_stay_apart(tmp_path):
    first, second = engine(simulated()), engine(simulated())
    serve(first, [list(range(65))], salt="x")
    saved(first, tmp_path / "kv")
    restored(second, tmp_path / "kv")
    pool = second.scheduler.ledger.pool
    looks = [pool.look(Request("a", range(65), 1, **fields)) for fields in ({"salt": "x"}, {}, {"salt": "y"})]
    assert [64, 0, 0] == looks


@pytest.mark.parametrize(
    ("made", "model", "says"),
    [
        (lambda: engine(simulated()), "another", "its model is a model, and this server's is another"),
        (lambda: engine(SimulatedExecutor(Capacity(32, 10, 400), range(256))), "a model", "its block size is 16"),
    ],
)
def test_a_file_of_another_server_is_not_used(tmp_path, made, model, says):
    first = engine(simulated())
    serve(first, prompts(16)[:2])
    saved(first, tmp_path / "kv")
    second = made()
    back = restored(second, tmp_path / "kv", model)
    assert 0 == back.blocks
    assert says in back.note
    check(tmp_path / "kv")


def damage(data: bytes, kind: str) -> bytes:
    at = data.index(b"\n") + 2 * (6 + 64 + 4096 + 16) + 900
    return data[:at] if kind == "cut" else data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("kind", ["cut", "changed"])
def test_of_a_damaged_file_only_what_comes_before_is_used(tmp_path, kind):
    first, second = engine(simulated()), engine(simulated())
    serve(first, [list(range(100))])
    number = saved(first, tmp_path / "kv")
    (tmp_path / "kv").write_bytes(damage((tmp_path / "kv").read_bytes(), kind))
    back = restored(second, tmp_path / "kv")
    assert 2 == back.blocks < number
    assert f"damaged or cut short after 2 of {number} blocks; 2 are used" in back.note
    assert 32 == second.scheduler.ledger.pool.look(Request("a", range(100), 1))
    second.scheduler.ledger.check()


@pytest.mark.parametrize("text", [b"", b"hello", b"[1]", b'{"a": 1}\n', b"\xff" * 100])
def test_a_file_that_is_something_else_is_not_written_over(tmp_path, text):
    (tmp_path / "kv").write_bytes(text)
    with pytest.raises(ValueError, match="is not a file of saved KV, and would be written over"):
        check(tmp_path / "kv")


def test_a_file_needs_a_folder(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        check(tmp_path / "no" / "kv")


def test_without_a_file_the_cache_begins_empty(tmp_path):
    assert 0 == restored(engine(simulated()), tmp_path / "kv").blocks


def test_a_head_with_other_types_is_something_else(tmp_path):
    (tmp_path / "kv").write_text(json.dumps({"stallfree_kv": 1, "blocks": "many", "adapters": []}) + "\n")
    with pytest.raises(ValueError, match="is not a file of saved KV"):
        check(tmp_path / "kv")


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    made = engine(simulated())
    serve(made, prompts(16)[:1])
    saved(made, tmp_path / "kv")
    before = (tmp_path / "kv").read_bytes()
    serve(made, prompts(16)[1:3])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        saved(made, tmp_path / "kv")
    assert before == (tmp_path / "kv").read_bytes()
    assert ["kv"] == [path.name for path in tmp_path.iterdir()]
