"""An adapter gives the logits of the model with merged weights, in any batch, chunk and order; by torch and by the kernels."""

import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stallfree.checkpoint import CheckpointError, open_checkpoint
from stallfree.checkpoint.adapter import MAX_RANK, MODULES, open_adapter
from stallfree.core.plan import Plan
from stallfree.executors.base import Adapts
from tests.adapters import made_adapter, merged
from tests.executors.test_openvino import TOKENS, work
from tests.models import write_folder

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from stallfree.executors.torch import Options, ParallelExecutor, TorchExecutor, lora  # noqa: E402
from stallfree.executors.torch.driver import Local  # noqa: E402
from stallfree.executors.torch.graphs import empty as empty_batch  # noqa: E402
from stallfree.executors.torch.graphs import first, put  # noqa: E402

KV = 1 << 23
EXACT = Options("f32", "f32")
CLOSE = 1e-4
"""How far a float32 logit may be from the merged model's. Logits here are of the order of 1 to 10."""
FIRST = 100
"""Adapters are loaded from this block on; the sequences' blocks are below."""
SETS = (("r1", 1, MODULES), ("r3", 3, ("q_proj", "down_proj")), ("r8", 8, ("k_proj", "v_proj")), ("r64", 64, MODULES[3:]))
ORDER = ("r8", "", "r64", "r64", "r1", "r3", "", "r8")
"""The adapters of the sequences of a batch."""


@pytest.fixture(params=["torch", "kernels"])
def way(request, monkeypatch):
    """What computes the products: torch, or the kernels in Triton's interpreter."""
    if request.param == "kernels":
        pytest.importorskip("triton")
        monkeypatch.setattr(lora, "reference", lora._adapt)
    return request.param


@pytest.fixture(scope="module", params=["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_folder(folder, request.param)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    write_folder(folder, "llama", attention_bias=True, mlp_bias=True)
    return open_checkpoint(folder)


def adapter_of(folder, config, modules=MODULES, rank=8, seed=0, **changes):
    return open_adapter(made_adapter(folder, config, modules, rank, seed, **changes), config)


def loaded(executor, key, adapter, first=FIRST):
    """Load into blocks in falling order from `first` on. Returns the first block that is free afterwards."""
    end = first + executor.adapter_blocks(adapter)
    executor.load_adapter(key, adapter, tuple(range(first, end))[::-1])
    return end


def piece(key="", tokens=TOKENS, start=0, number=0):
    """Work of the sequence of this number, in its own six blocks of 16 tokens."""
    own = work(list(tokens), start, id=f"{number} {key}")
    return own._replace(adapter=key, blocks=tuple(range(6 * number, 6 * number + 6)))


def merged_logits(checkpoint, adapter):
    return TorchExecutor(merged(checkpoint, adapter), EXACT, KV).logits([piece()])


def assert_close(expected, logits):
    np.testing.assert_allclose(logits, expected, rtol=0, atol=CLOSE)


def test_it_can_run_adapters(llama):
    assert isinstance(TorchExecutor(llama, EXACT, KV), Adapts)
    assert all(hasattr(ParallelExecutor, name) for name in ("adapter_blocks", "load_adapter", "drop_adapter"))


@pytest.mark.parametrize("module", MODULES)
def test_each_module_gives_the_logits_of_merged_weights(module, way, llama, tmp_path):
    executor, adapter = TorchExecutor(llama, EXACT, KV), adapter_of(tmp_path, llama.config, (module,))
    loaded(executor, "a", adapter)
    expected = merged_logits(llama, adapter)
    assert np.abs(expected - executor.logits([piece()])).max() > 100 * CLOSE
    assert_close(expected, executor.logits([piece("a")]))


def several(executor, checkpoint, folder):
    """Load adapters of ranks 1 to 64, with other modules in each. Returns the logits of each, and of none, by key."""
    expected, end = {"": TorchExecutor(checkpoint, EXACT, KV).logits([piece()])}, FIRST
    for seed, (key, rank, modules) in enumerate(SETS):
        adapter = adapter_of(folder / key, checkpoint.config, modules, rank, seed)
        end = loaded(executor, key, adapter, end)
        expected[key] = merged_logits(checkpoint, adapter)
    return expected


def test_a_mixed_batch_gives_each_row_its_own_adapter(way, checkpoint, tmp_path):
    executor = TorchExecutor(checkpoint, EXACT, KV)
    expected = several(executor, checkpoint, tmp_path)
    whole = executor.logits([piece(key, number=i) for i, key in enumerate(ORDER)])
    assert_close(np.concatenate([expected[key] for key in ORDER]), whole)
    # Chunks and decodes of different lengths; each time the sequences are in another order.
    starts = [0] * len(ORDER)
    for counts in ([30, 9, 1, 40, 33, 2, 1, 5], [1] * 8, [9, 30, 40, 1, 2, 33, 40, 1]):
        pieces = list(zip(range(len(ORDER)), ORDER, starts, counts, strict=True))[::-1]
        batch = [piece(key, TOKENS[at : at + count], at, i) for i, key, at, count in pieces]
        assert_close(np.concatenate([expected[key][at : at + count] for _, key, at, count in pieces]), executor.logits(batch))
        starts = [at + count for at, count in zip(starts, counts, strict=True)]


def test_neighbours_with_one_adapter_share_runs(llama, tmp_path):
    executor = TorchExecutor(llama, EXACT, KV)
    for number, key in enumerate("ab"):
        loaded(executor, key, adapter_of(tmp_path / key, llama.config, seed=number), FIRST + 60 * number)
    pieces = (("a", 1), ("a", 3), ("", 2), ("a", 70), ("b", 60), ("b", 1), ("b", 5))
    adapted = executor._runner.adapters.of([piece(key, TOKENS[:1] * count) for key, count in pieces])
    assert [[0, 4], [6, 64], [70, 6], [76, 64], [140, 2]] == adapted.runs[:2].T.tolist()
    assert executor._runner.adapters.of([piece()]) is None


def test_recorded_decodes_get_the_adapters_of_the_batch(way, llama, tmp_path):
    """The memory of a recorded iteration, as it is for graphs, gives what the batch itself gives."""
    runner = (executor := TorchExecutor(llama, EXACT, KV))._runner
    several(executor, llama, tmp_path)
    capacity = executor.capacity
    executor.logits([piece(key, TOKENS[:40], number=i) for i, key in enumerate(ORDER)])
    expected = executor.logits([piece(key, TOKENS[40:41], 40, i) for i, key in enumerate(ORDER)])
    with torch.inference_mode():
        recorded = empty_batch(16, capacity, capacity.num_blocks, torch.device("cpu"))
        object.__setattr__(recorded, "adapted", runner.adapters.decodes(16))
        batches = []
        runner._call = lambda batch, hidden, computed: batches.append(batch) or torch.zeros(len(batch.rows), 1)
        runner.run([piece(key, TOKENS[40:41], 40, i) for i, key in enumerate(ORDER)], range(len(ORDER)))
        put(batches[0], recorded, 12, capacity.num_blocks, 16)
        logits = runner._model(first(recorded, 12, has_adapters=True), None, runner._cache)
    assert_close(expected, logits[: len(ORDER)].numpy())


def test_a_dropped_adapter_is_the_same_in_other_blocks(way, llama, tmp_path):
    executor, adapter = TorchExecutor(llama, EXACT, KV), adapter_of(tmp_path, llama.config)
    end = loaded(executor, "a", adapter)
    before = executor.logits([piece("a")])
    executor.drop_adapter("a")
    blocks = range(FIRST, end)
    executor.write_blocks(blocks, memoryview(bytearray(b"\xff" * len(blocks) * executor.block_bytes)))
    loaded(executor, "a", adapter, end + 1)
    np.testing.assert_array_equal(before, executor.logits([piece("a")]))


def test_rows_without_adapters_are_computed_as_before(llama, tmp_path):
    executor = TorchExecutor(llama, EXACT, KV)
    before = executor.logits([piece()])
    loaded(executor, "a", adapter_of(tmp_path, llama.config))
    executor.logits([piece("a")])
    np.testing.assert_array_equal(before, executor.logits([piece()]))


def test_some_layers_alone_and_another_rank_in_one_module(way, llama, tmp_path):
    executor = TorchExecutor(llama, EXACT, KV)
    adapter = adapter_of(tmp_path, llama.config, layers_to_transform=[1], rank_pattern={"k_proj": 3}, use_rslora=True)
    loaded(executor, "a", adapter)
    assert_close(merged_logits(llama, adapter), executor.logits([piece("a")]))


def test_work_with_an_unknown_key_fails_alone(llama, tmp_path):
    executor, adapter = TorchExecutor(llama, EXACT, KV), adapter_of(tmp_path, llama.config)
    loaded(executor, "a", adapter)
    executor.submit(Plan(0, 0.0, (piece("b"), piece("a", number=1))))
    result = executor.collect()
    assert {"1 a": (int(merged_logits(llama, adapter)[-1].argmax()),)} == result.tokens
    assert {"0 b": "request 0 b: adapter 'b' is not loaded; load it, or ask for the base model"} == result.failed
    executor.drop_adapter("a")
    with pytest.raises(ValueError, match="adapter 'a' is not loaded"):
        executor.submit(Plan(1, 0.0, (piece("a"),)))


def test_an_adapter_that_cannot_be_read_is_not_there(llama, tmp_path):
    executor, file = TorchExecutor(llama, EXACT, KV), made_adapter(tmp_path, llama.config) / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="NaN"):
        loaded(executor, "a", open_adapter(tmp_path, llama.config))
    with pytest.raises(ValueError, match="not loaded"):
        executor.submit(Plan(0, 0.0, (piece("a"),)))


def test_what_cannot_be_run_is_named(llama, tmp_path):
    executor, config = TorchExecutor(llama, EXACT, KV), llama.config
    adapter = adapter_of(tmp_path / "a", config)
    needed = executor.adapter_blocks(adapter)
    with pytest.raises(CheckpointError, match=f"takes {needed} KV blocks and got {needed + 1}"):
        executor.load_adapter("a", adapter, range(needed + 1))
    folder = made_adapter(tmp_path / "large", config, rank=MAX_RANK + 1)
    with pytest.raises(ValueError, match="rank 257; the torch executor runs adapters of at most 256"):
        executor.adapter_blocks(open_adapter(folder, config, max_rank=1000))
    write_folder(tmp_path / "mixtral", "mixtral", num_local_experts=2, sliding_window=None)
    mixtral = open_checkpoint(tmp_path / "mixtral")
    other = open_adapter(made_adapter(tmp_path / "of mixtral", mixtral.config), mixtral.config)
    with pytest.raises(ValueError, match="runs no adapters of mixtral, only of llama, mistral, qwen2, qwen3"):
        TorchExecutor(mixtral, EXACT, KV).adapter_blocks(other)


def test_loading_in_another_thread_disturbs_no_iteration(llama, tmp_path):
    executor, adapter, errors = TorchExecutor(llama, EXACT, KV), adapter_of(tmp_path, llama.config), []
    expected = executor.logits([piece()])

    def load(key, first):
        try:
            loaded(executor, key, adapter, first)
        except Exception as error:
            errors.append(error)

    for number, key in enumerate("abc"):
        thread = threading.Thread(target=load, args=(key, FIRST + 60 * number))
        thread.start()
        while thread.is_alive():
            np.testing.assert_array_equal(expected, executor.logits([piece()]))
        thread.join()
    assert [] == errors
    batch = [piece(key, number=i) for i, key in enumerate("abc")]
    assert_close(np.concatenate([merged_logits(llama, adapter)] * 3), executor.logits(batch))


@pytest.mark.parametrize(("weights", "kv"), [("f32", "fp8"), ("bf16", "bf16"), ("int8", "f32")])
def test_every_format_holds_adapters(llama, tmp_path, weights, kv):
    """The error stays that of the format, as without adapters."""
    adapter = adapter_of(tmp_path, llama.config)
    executor, other = (TorchExecutor(of, Options(weights, kv), KV) for of in (llama, merged(llama, adapter)))
    loaded(executor, "a", adapter)
    expected, own = merged_logits(llama, adapter), executor.logits([piece("a")])
    limit = 2 * np.abs(other.logits([piece()]) - expected).mean()
    assert np.abs(own - expected).mean() < limit


def last_tokens(executor, keys):
    """The token that follows the prompt, by adapter; the prompts are computed in two chunks."""
    for step, (start, end) in enumerate(((0, 50), (50, len(TOKENS)))):
        executor.submit(Plan(step, 0.0, tuple(piece(key, TOKENS[start:end], start, i) for i, key in enumerate(keys))))
        result = executor.collect()
        assert {} == dict(result.failed)
    return {id.partition(" ")[2]: token for id, (token,) in result.tokens.items()}


@pytest.mark.parametrize(("tp", "sp", "pp", "heads"), [(2, 1, 1, 2), (2, 1, 1, 1), (1, 1, 2, 2), (1, 2, 1, 2)])
def test_ranks_give_the_tokens_of_merged_weights(tp, sp, pp, heads, tmp_path):
    write_folder(tmp_path / "base", "llama", num_key_value_heads=heads)
    checkpoint = open_checkpoint(tmp_path / "base")
    executor = ParallelExecutor(checkpoint, EXACT, sp * KV // 2, tp=tp, sp=sp, pp=pp, workers=Local())
    try:
        expected = several(executor, checkpoint, tmp_path)
        keys = tuple(expected)
        tokens = {key: int(logits[-1].argmax()) for key, logits in expected.items()}
        assert tokens == last_tokens(executor, keys)
        executor.drop_adapter("r8")
        loaded(executor, "r8", open_adapter(tmp_path / "r8", checkpoint.config), FIRST + 100)
        assert tokens == last_tokens(executor, keys)
        with pytest.raises(ValueError, match="adapter 'x' is not loaded"):
            executor.submit(Plan(9, 0.0, (piece("x"),)))
    finally:
        executor.close()


def test_a_rank_that_cannot_read_an_adapter_says_so_and_goes_on(llama, tmp_path):
    executor = ParallelExecutor(llama, EXACT, KV, tp=2, pp=1, workers=Local())
    try:
        adapter = adapter_of(tmp_path / "a", llama.config)
        loaded(executor, "a", adapter)
        Path(tmp_path / "b").symlink_to(tmp_path / "a")
        (tmp_path / "a" / "adapter_model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="rank 0: .*missing; the adapter is incomplete"):
            loaded(executor, "b", adapter, FIRST + 100)
        with pytest.raises(ValueError, match="adapter 'b' is not loaded"):
            executor.submit(Plan(0, 0.0, (piece("b"),)))
        assert {"a", ""} == set(last_tokens(executor, ("a", "")))
    finally:
        executor.close()
