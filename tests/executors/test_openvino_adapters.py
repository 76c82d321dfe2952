"""An adapter gives the logits of the model with merged weights, in any batch, chunk and order; rows without one are as before."""

import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stallfree.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from stallfree.checkpoint.adapter import MODULES, Adapter, open_adapter
from stallfree.core.plan import Plan, Work
from stallfree.executors.base import Adapts
from stallfree.executors.openvino import OpenVINOExecutor
from tests.adapters import made_adapter, merged
from tests.executors.test_openvino import CLOSE, EXPERTS, TOKENS, work
from tests.models import write_folder

pytest.importorskip("torch")
pytest.importorskip("transformers")

KV = 1 << 23
EXACT = 1e-4
"""How far a float32 logit may be from the merged model's. Logits here are of the order of 1 to 10."""

FIRST_BLOCK = 40
"""Adapters are loaded from here on; the sequences' blocks are below."""


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp(request.param)
    write_folder(folder, request.param)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("llama")
    write_folder(folder, "llama", attention_bias=True, mlp_bias=True)
    return open_checkpoint(folder)


@pytest.fixture
def executor(llama: Checkpoint) -> Iterator[OpenVINOExecutor]:
    executor = made_executor(llama)
    yield executor
    executor.close()


def made_executor(checkpoint: Checkpoint) -> OpenVINOExecutor:
    return OpenVINOExecutor(checkpoint, weights="f32", kv="f32", kv_bytes=KV)


def loaded(executor: OpenVINOExecutor, key: str, adapter: Adapter, first: int = FIRST_BLOCK) -> int:
    """Load into blocks in falling order from `first` on. Returns the first block that is free afterwards."""
    end = first + executor.adapter_blocks(adapter)
    executor.load_adapter(key, adapter, tuple(range(first, end))[::-1])
    return end


def merged_logits(checkpoint: Checkpoint, adapter: Adapter) -> np.ndarray:
    executor = made_executor(merged(checkpoint, adapter))
    logits = executor.logits([work(TOKENS)])
    executor.close()
    return logits


def with_adapter(key: str, tokens: Sequence[int] = TOKENS, start: int = 0, first_block: int = 0) -> Work:
    return work(list(tokens), start, id=key or "none", first_block=first_block)._replace(adapter=key)


def assert_close(expected: np.ndarray, logits: np.ndarray) -> None:
    np.testing.assert_allclose(logits, expected, rtol=0, atol=EXACT)


def test_it_can_run_adapters(executor: OpenVINOExecutor) -> None:
    assert isinstance(executor, Adapts)


@pytest.mark.parametrize("module", MODULES)
def test_each_module_gives_the_logits_of_merged_weights(
    module: str, llama: Checkpoint, executor: OpenVINOExecutor, tmp_path: Path
) -> None:
    adapter = open_adapter(made_adapter(tmp_path, llama.config, (module,)), llama.config)
    loaded(executor, "a", adapter)
    expected = merged_logits(llama, adapter)
    assert np.abs(expected - executor.logits([work(TOKENS)])).max() > 100 * EXACT
    assert_close(expected, executor.logits([with_adapter("a")]))


def test_a_mixed_batch_gives_each_row_its_own_adapter(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Ranks 1 to 64, other modules in each, rows without an adapter; as whole prompts, chunks and decodes."""
    executor, config, first = made_executor(checkpoint), checkpoint.config, FIRST_BLOCK
    expected = {"": executor.logits([work(TOKENS)])}
    sets = [("r1", 1, MODULES), ("r3", 3, ("q_proj", "down_proj")), ("r8", 8, ("k_proj", "v_proj")), ("r64", 64, MODULES[3:])]
    for seed, (key, rank, modules) in enumerate(sets):
        adapter = open_adapter(made_adapter(tmp_path / key, config, modules, rank, seed), config)
        first = loaded(executor, key, adapter, first)
        expected[key] = merged_logits(checkpoint, adapter)
    order = ["r8", "", "r64", "r1", "r3", "", "r8"]
    whole = executor.logits([with_adapter(key, first_block=3 * i) for i, key in enumerate(order)])
    assert_close(np.concatenate([expected[key] for key in order]), whole)
    # Chunks and decodes of different lengths; then the same sequences in another order, and some of them alone.
    starts = [0] * len(order)
    for counts in ([30, 9, 1, 40, 33, 2, 1], [1, 1, 1, 1, 1, 1, 1], [9, 30, 40, 1, 2, 33, 40]):
        pieces = list(zip(range(len(order)), order, starts, counts, strict=True))[::-1]
        batch = [with_adapter(key, TOKENS[at : at + count], at, 3 * i) for i, key, at, count in pieces]
        assert_close(np.concatenate([expected[key][at : at + count] for _, key, at, count in pieces]), executor.logits(batch))
        starts = [at + count for at, count in zip(starts, counts, strict=True)]
    for i, key in ((2, "r64"), (4, "r3"), (1, ""), (6, "r8")):
        at = starts[i]
        assert_close(expected[key][at : at + 1], executor.logits([with_adapter(key, TOKENS[at : at + 1], at, 3 * i)]))
    executor.close()


def test_adapters_that_come_and_go_between_iterations_stay_exact(
    llama: Checkpoint, executor: OpenVINOExecutor, tmp_path: Path
) -> None:
    """Every iteration has another set, so that the working copy grows, shrinks and closes its gaps."""
    first, expected = FIRST_BLOCK, {}
    for seed, rank in enumerate((8, 17, 2, 9)):
        adapter = open_adapter(made_adapter(tmp_path / str(seed), llama.config, MODULES[:4], rank, seed), llama.config)
        first = loaded(executor, str(seed), adapter, first)
        expected[str(seed)] = merged_logits(llama, adapter)
    for keys in ("0123", "3", "13", "0", "210", "23", "0123", "2", "", "31"):
        batch = [with_adapter(key, first_block=3 * i) for i, key in enumerate(keys or [""])]
        logits = executor.logits(batch)
        if keys:
            assert_close(np.concatenate([expected[key] for key in keys]), logits)


def test_a_dropped_adapter_is_the_same_in_other_blocks(llama: Checkpoint, executor: OpenVINOExecutor, tmp_path: Path) -> None:
    adapter = open_adapter(made_adapter(tmp_path, llama.config, MODULES), llama.config)
    end = loaded(executor, "a", adapter)
    before = executor.logits([with_adapter("a")])
    executor.drop_adapter("a")
    blocks = range(FIRST_BLOCK, end)
    executor.write_blocks(blocks, memoryview(bytearray(b"\xff" * len(blocks) * executor.block_bytes)))
    loaded(executor, "a", adapter, end + 1)
    np.testing.assert_array_equal(before, executor.logits([with_adapter("a")]))


def test_another_adapter_under_the_same_key_replaces_the_first(
    llama: Checkpoint, executor: OpenVINOExecutor, tmp_path: Path
) -> None:
    for seed in range(2):
        adapter = open_adapter(made_adapter(tmp_path / str(seed), llama.config, seed=seed), llama.config)
        loaded(executor, "a", adapter)
        assert_close(merged_logits(llama, adapter), executor.logits([with_adapter("a")]))
        executor.drop_adapter("a")


def test_rows_without_adapters_are_computed_as_before(llama: Checkpoint, executor: OpenVINOExecutor, tmp_path: Path) -> None:
    before = executor.logits([work(TOKENS)])
    loaded(executor, "a", open_adapter(made_adapter(tmp_path, llama.config), llama.config))
    executor.logits([with_adapter("a")])
    np.testing.assert_array_equal(before, executor.logits([work(TOKENS)]))


def test_work_with_an_unknown_key_fails_alone(llama: Checkpoint, executor: OpenVINOExecutor, tmp_path: Path) -> None:
    adapter = open_adapter(made_adapter(tmp_path, llama.config), llama.config)
    loaded(executor, "a", adapter)
    expected = merged_logits(llama, adapter)[-1].argmax()
    executor.submit(Plan(0, 0.0, (with_adapter("b"), with_adapter("a", first_block=3))))
    result = executor.collect()
    assert {"a": (int(expected),)} == result.tokens
    assert {"b": "request b: adapter 'b' is not loaded; load it, or ask for the base model"} == result.failed
    executor.drop_adapter("a")
    with pytest.raises(ValueError, match="adapter 'a' is not loaded"):
        executor.submit(Plan(1, 0.0, (with_adapter("a"),)))


def test_an_adapter_that_cannot_be_read_changes_nothing(llama: Checkpoint, executor: OpenVINOExecutor, tmp_path: Path) -> None:
    file = made_adapter(tmp_path, llama.config) / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, file)
    adapter = open_adapter(tmp_path, llama.config)
    blocks = range(FIRST_BLOCK, FIRST_BLOCK + executor.adapter_blocks(adapter))
    size = len(blocks) * executor.block_bytes
    before, after = bytearray(np.random.default_rng(0).bytes(size)), bytearray(size)
    executor.write_blocks(blocks, memoryview(before))
    with pytest.raises(CheckpointError, match="NaN"):
        executor.load_adapter("a", adapter, blocks)
    executor.read_blocks(blocks, memoryview(after))
    assert before == after
    with pytest.raises(ValueError, match="not loaded"):
        executor.submit(Plan(0, 0.0, (with_adapter("a"),)))


def test_a_wrong_number_of_blocks_or_a_key_in_use_is_refused(llama: Checkpoint, executor: OpenVINOExecutor, tmp_path: Path) -> None:
    adapter = open_adapter(made_adapter(tmp_path, llama.config), llama.config)
    needed = executor.adapter_blocks(adapter)
    with pytest.raises(ValueError, match=f"needs {needed} KV blocks, not {needed + 1}"):
        executor.load_adapter("a", adapter, range(needed + 1))
    loaded(executor, "a", adapter)
    with pytest.raises(ValueError, match="adapter 'a' is loaded already; drop it first"):
        loaded(executor, "a", adapter)


def test_blocks_follow_from_rank_and_modules(llama: Checkpoint, executor: OpenVINOExecutor, tmp_path: Path) -> None:
    """A and B of q_proj: 8 x (96 + 128) numbers of 4 bytes in each of 3 layers."""
    adapter = open_adapter(made_adapter(tmp_path, llama.config, ("q_proj",)), llama.config)
    assert -(-3 * 8 * (96 + 128) * 4 // executor.block_bytes) == executor.adapter_blocks(adapter)


def test_enormous_weights_do_not_reach_other_rows(llama: Checkpoint, executor: OpenVINOExecutor, tmp_path: Path) -> None:
    """Products that overflow stay with the rows of their adapter."""
    alone = executor.logits([work(TOKENS)])
    folder = made_adapter(tmp_path, llama.config)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: np.full_like(values, 1e38) for name, values in tensors.items()}, folder / "adapter_model.safetensors")
    loaded(executor, "a", open_adapter(folder, llama.config))
    both = executor.logits([with_adapter("a"), with_adapter("", first_block=3)])
    assert_close(alone, both[len(TOKENS) :])


@pytest.mark.parametrize("kv", ["f32", "u8", "u4"])
def test_what_was_computed_to_warm_up_stays_out_of_the_first_iterations(llama: Checkpoint, tmp_path: Path, kv: str) -> None:
    executor = OpenVINOExecutor(llama, weights="f32", kv=kv, kv_bytes=KV)
    garbage = bytes([0xFF]) * (executor.block_bytes * executor.capacity.num_blocks)  # no numbers, in any format
    executor.write_blocks(range(executor.capacity.num_blocks), bytearray(garbage))  # type: ignore[arg-type]
    plain = executor.logits([work(TOKENS)])
    first = FIRST_BLOCK
    for number in range(7):
        adapter = open_adapter(made_adapter(tmp_path / str(number), llama.config, seed=number), llama.config)
        first = loaded(executor, str(number), adapter, first)
        keys = ["", *map(str, range(number + 1))]
        logits = executor.logits([with_adapter(key, first_block=3 * i) for i, key in enumerate(keys)])
        assert np.isfinite(logits).all()
        np.testing.assert_allclose(logits[: len(TOKENS)], plain, rtol=0, atol=EXACT if kv == "f32" else 0.2)
    executor.close()


def test_loading_in_another_thread_disturbs_no_iteration(llama: Checkpoint, executor: OpenVINOExecutor, tmp_path: Path) -> None:
    adapter = open_adapter(made_adapter(tmp_path, llama.config, MODULES), llama.config)
    expected, errors = executor.logits([work(TOKENS)]), []
    for key in "abc":

        def load(key: str = key, first: int = FIRST_BLOCK + 25 * "abc".index(key)) -> None:
            try:
                loaded(executor, key, adapter, first)
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=load)
        thread.start()
        while thread.is_alive():
            np.testing.assert_array_equal(expected, executor.logits([work(TOKENS)]))
        thread.join()
    assert [] == errors
    batch = [with_adapter(key, first_block=3 * i) for i, key in enumerate("abc")]
    assert_close(np.concatenate([merged_logits(llama, adapter)] * 3), executor.logits(batch))


def test_the_default_formats_are_close_to_exact(llama: Checkpoint, tmp_path: Path) -> None:
    adapter = open_adapter(made_adapter(tmp_path, llama.config, MODULES), llama.config)
    executor = OpenVINOExecutor(llama, kv_bytes=KV)
    loaded(executor, "a", adapter)
    expected = merged_logits(llama, adapter)
    assert np.abs(executor.logits([with_adapter("a")]) - expected).mean() < CLOSE * expected.std()
    executor.close()


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("granite", {"embedding_multiplier": 6.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1}),
        ("olmo2", {}),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 3, "sliding_window": 20}),
    ],
)
def test_logits_are_those_of_peft(family: str, config: dict[str, object], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    model = write_folder(tmp_path / "base", family, **config)
    settings = peft.LoraConfig(
        r=4, lora_alpha=12, use_rslora=True, target_modules=list(MODULES), rank_pattern={"q_proj": 6}, alpha_pattern={"v_proj": 5}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft calls what transformers has deprecated
        adapted = peft.get_peft_model(model, settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted.merge_and_unload()(torch.tensor([TOKENS])).logits[0].numpy()
    checkpoint = open_checkpoint(tmp_path / "base")
    executor = made_executor(checkpoint)
    loaded(executor, "a", open_adapter(tmp_path / "adapter", checkpoint.config))
    assert_close(expected, executor.logits([with_adapter("a")]))
    executor.close()


def test_a_mixture_of_experts_has_adapters_on_attention(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", "qwen3_moe", **EXPERTS)
    checkpoint = open_checkpoint(tmp_path / "model")
    adapter = open_adapter(made_adapter(tmp_path / "adapter", checkpoint.config, ("q_proj", "o_proj")), checkpoint.config)
    executor = made_executor(checkpoint)
    loaded(executor, "a", adapter)
    assert_close(merged_logits(checkpoint, adapter), executor.logits([with_adapter("a")]))
    executor.close()
