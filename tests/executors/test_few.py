"""A few tokens without the graph: the same logits, the same KV, for every family and every form of weights that it takes."""

import gc
import os
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stallfree.checkpoint import open_checkpoint
from stallfree.checkpoint.adapter import open_adapter
from stallfree.core.plan import Work
from stallfree.executors.machine import Room
from stallfree.executors.openvino import OpenVINOExecutor
from stallfree.executors.openvino.few import MOST, USUAL, forward, kernels, obstacle, vectors
from stallfree.executors.openvino.few.compiled import KEEPS
from stallfree.executors.openvino.few.products import INT4, INT8, SUMS, UINT4
from tests.adapters import made_adapter
from tests.checkpoint.packing import CONFIGS, pack_folder
from tests.executors.test_openvino import CLOSE, MODELS, TOKENS, work
from tests.models import write_folder, write_gguf

KV = 1 << 21
DENSE = [name for name, (family, _) in MODELS.items() if family not in ("mixtral", "qwen3_moe", "gpt_oss") and name != "phi4 mini"]
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}
PIECES = [20, 1, 1, 4, 3, 2, 1, 7, 1, 4, 17, 9, 4, 1]
FEW = 16
"""Chunks of `TOKENS`: those of up to `FEW` tokens do not take the graph, and read what it wrote, and it what they wrote."""


def logits(executor: OpenVINOExecutor) -> np.ndarray:
    rows, start = [], 0
    for count in PIECES:
        rows.append(executor.logits([work(TOKENS[start : start + count], start)]))
        start += count
    return np.concatenate(rows)


def check(checkpoint, weights: str, close: float) -> None:
    exact = OpenVINOExecutor(checkpoint, weights="f32", kv="f32", kv_bytes=KV)
    executor = OpenVINOExecutor(checkpoint, weights=weights, kv_bytes=KV)
    assert (exact.most_few, executor.most_few) == (0, MOST)
    executor.few = FEW
    wanted, found = logits(exact), logits(executor)
    executor.few = MOST
    at_once = executor.logits([work(TOKENS)])
    executor.few = 0
    graph = logits(executor)
    assert np.abs(found - graph).max() > 0  # it went another way
    assert np.abs(found - wanted).mean() < close * wanted.std()
    assert np.abs(at_once - wanted).mean() < close * wanted.std()
    executor.close()


@pytest.mark.parametrize("name", DENSE)
def test_every_dense_family(name, tmp_path):
    family, config = MODELS[name]
    write_folder(tmp_path, family, **config)
    check(open_checkpoint(tmp_path), "int8", CLOSE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    write_folder(folder, "llama", **SIZES)
    return folder


@pytest.mark.parametrize("form", ["Q4_0", "Q4_1", "Q8_0", *CONFIGS])
def test_every_form_of_the_files_own_bits(form, plain, tmp_path):
    if form in CONFIGS:
        for file in plain.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        pack_folder(tmp_path, form)
        checkpoint = open_checkpoint(tmp_path)
    else:
        write_gguf(tmp_path / "model.gguf", open_checkpoint(plain), form)
        checkpoint = open_checkpoint(tmp_path / "model.gguf")
    check(checkpoint, "file", CLOSE)


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def multiplied(kind, width, least_width, half, together, vectors, rows, groups, draw, kept=KEEPS) -> tuple[np.ndarray, np.ndarray]:
    """The products of random matrices and vectors by `rows_product`, and by their definition, [vectors, rows]."""
    own = width if kind == INT8 else 32
    if kind == INT8:
        codes = draw.integers(-128, 128, (rows, groups, width)).astype(np.int8)
        numbers, most = codes.astype(float), 32767
    else:
        codes = draw.integers(0, 256, (rows, groups * width // 2), np.uint8)
        numbers, most = np.stack([codes & 15, codes >> 4], -1).reshape(rows, groups, width).astype(float), 127
    scales = draw.uniform(0.1, 1, (rows, groups)).astype(np.float16 if half else np.float32)
    zeros = draw.integers(0, 16, (rows, groups), np.uint8)
    numbers -= {INT8: 0, INT4: 16 * (numbers > 7), UINT4: zeros[..., None]}[kind]
    weights = (numbers * scales[..., None].astype(float)).reshape(rows, -1)
    least = draw.integers(-127, 128, (rows, groups), np.int8)
    least_scales = draw.uniform(0.01, 0.1, (rows, groups // max(1, least_width))).astype(np.float32)
    if least_width:
        added = least * np.repeat(least_scales, least_width, axis=1)
        weights += np.repeat(added, width, axis=1)
    x = draw.integers(-most, most + 1, (vectors, groups * width // own, own))
    x_scales = draw.uniform(0.001, 0.1, x.shape[:2]).astype(np.float32)
    values = x * x_scales[..., None]
    sums = values.sum(-1).astype(np.float32)
    laid = x.astype(np.int16)
    repeated = x_scales if kind == INT8 else np.repeat(x_scales, SUMS, axis=1)
    if kind != INT8:
        laid = x.reshape(vectors, -1, together * 16, 2).swapaxes(-1, -2).astype(np.int8)
    laid, out = np.ascontiguousarray(laid), np.full((vectors, rows + 3), np.nan, np.float32)
    arrays = codes, zeros, scales, least, least_scales
    kernels.rows_product(kind, width, least_width, half, together, vectors, kept).ctypes(
        1, rows, *map(address, arrays), x.shape[1], *map(address, (laid, repeated, sums, out)), rows + 3
    )
    assert np.isnan(out[:, 0]).all()  # the first row is left to others, and nothing is written behind the last
    assert np.isnan(out[:, rows:]).all()
    return out[:, 1:rows], (values.reshape(vectors, -1) @ weights.T)[:, 1:]


GROUPS = ((32, 0), (64, 0), (128, 0), (32, 16), (32, 18), (32, 32))
FORMS = [(INT8, width, 0, half, 0) for width in (32, 64, 96) for half in (0, 1)]
FORMS += [(kind, *group, half, 2) for kind in (INT4, UINT4) for group in GROUPS for half in (0, 1)]
FORMS += [(kind, *group, half, 4) for kind in (INT4, UINT4) for group in GROUPS if group[1] != 18 for half in (0, 1)]


@pytest.mark.parametrize("features", [None, {"avx2": True}, {}], ids=["this processor", "AVX2", "any"])
@pytest.mark.parametrize("form", FORMS)
def test_rows_are_multiplied_as_they_are_defined(form, features, monkeypatch):
    if features is not None:
        if form[3] != 1:
            pytest.skip("computed in one way, or as with the other scales")
        if features and not vectors.FEATURES.get("avx2"):
            pytest.skip("this processor has no AVX2")
        monkeypatch.setattr(vectors, "FEATURES", features)
        kernels.rows_product.cache_clear()
    for number in (1, 2, 4):
        draw = np.random.default_rng(number)
        found, wanted = multiplied(*form, number, 5, (form[4] or 2) * (form[2] or 3), draw, KEEPS and features is None)
        assert np.abs(found - wanted).max() < 2e-6 * np.abs(wanted).max() * 10
    if features is not None:
        kernels.rows_product.cache_clear()


def test_powers_of_e():
    x = np.linspace(-80, 80, 10_001).astype(np.float32)
    found, wanted = np.array([kernels.exp(value) for value in x]), np.exp(x.astype(float))
    assert np.abs(found / wanted - 1).max() < 1e-5  # of which 80 x 2^-24 are the rounding of x / ln 2


@settings(deadline=None, max_examples=40)
@given(
    heads=st.integers(1, 4),
    dim=st.sampled_from([32, 64, 128]),
    last=st.integers(1, 150),
    window=st.integers(0, 150),
    seed=st.integers(0, 99),
)
def test_attention_is_what_it_is_defined_as(heads, dim, last, window, seed):
    draw, block, first = np.random.default_rng(seed), 32, max(0, last - window) if window else 0
    table, kv = draw.permutation(6)[: -(-last // block)], []
    memory = np.zeros((2, 6, 2, block, 8 + dim), np.uint8)  # of two heads; the second is read
    for cache in memory:
        codes, scale, zero = draw.integers(0, 256, (last, dim)), draw.uniform(0.01, 0.02, last), draw.uniform(100, 150, last)
        about = np.stack([scale, zero], 1).astype(np.float32)
        for token in range(last):
            cache[table[token // block], 1, token % block] = np.concatenate(
                [about[token].view(np.uint8), codes[token].astype(np.uint8)]
            )
        kv.append((codes - about[:, 1:]) * about[:, :1])
    query = draw.standard_normal((heads, dim)).astype(np.float32)
    weights = np.exp(query @ kv[0][first:last].T)
    wanted = weights / weights.sum(-1, keepdims=True) @ kv[1][first:last]
    out, room = np.zeros((heads, dim), np.float32), np.zeros(heads * (dim + last + 2), np.float32)
    places = [address(cache) + memory[0, 0, 0].nbytes for cache in memory]
    blocks = table.astype(np.int64)
    kernels.heads_attention(dim, block, heads, KEEPS).ctypes(
        address(query), *places, address(blocks), memory[0, 0].nbytes, first, last, address(room), address(out)
    )
    assert np.abs(out - wanted).max() < 2e-3 * max(1, np.abs(wanted).max())


@pytest.fixture(scope="module")
def executor(plain):
    made = OpenVINOExecutor(open_checkpoint(plain), kv_bytes=KV)
    yield made
    made.close()


def test_tokens_of_several_requests_and_of_drafts_are_computed_together(executor):
    for id, first in (("a", 0), ("b", 3)):
        executor.logits([work(TOKENS[:33], id=id, first_block=first)])
    pieces = [work(TOKENS[33:36], 33, first_block=0), work(TOKENS[40:41], 33, id="b", first_block=3)]
    together = executor.logits(pieces)
    alone = [
        executor.logits([work(piece.tokens[:i][-1:], 33 + i - 1, first_block=piece.blocks[0])])
        for piece in pieces
        for i in range(1, piece.count + 1)
    ]
    assert np.abs(together - np.concatenate(alone)).max() < 1e-4 * np.abs(together).max()


def test_more_tokens_than_are_few_take_the_graph(executor):
    calls = []
    run = executor._few.logits
    executor._few.logits = lambda feed: calls.append(len(feed["input_ids"])) or run(feed)
    try:
        for few in (MOST, 2, 0):
            executor.few = few
            for count in (1, 2, 3, MOST, MOST + 1):
                halves = count // 2, count - count // 2
                executor.logits([work(TOKENS[:size], first_block=3 * i, id=str(i)) for i, size in enumerate(halves) if size])
    finally:
        executor._few.logits, executor.few = run, USUAL
    assert calls == [1, 2, 3, MOST, 1, 2]


def helpers() -> int:
    return sum(thread.name.startswith("few tokens") for thread in threading.enumerate())


def test_threads_end_with_their_executor(plain, executor):
    before = helpers()
    checkpoint = open_checkpoint(plain)
    closed, dropped = (OpenVINOExecutor(checkpoint, kv_bytes=KV, threads=3) for _ in "12")
    assert helpers() == before + 4
    closed.close()
    assert helpers() == before + 2
    del dropped
    gc.collect()
    assert helpers() == before


def test_a_team_of_any_size_computes_the_same(plain, executor):
    checkpoint = open_checkpoint(plain)
    for threads in (1, 3, 7):
        other = OpenVINOExecutor(checkpoint, kv_bytes=KV, threads=threads)
        executor.few = other.few = FEW
        for size in (40, 1, 3, 11):
            wanted, found = (each.logits([work(TOKENS[:size], 0 if size == 40 else 40)]) for each in (executor, other))
            assert size > FEW or np.array_equal(found, wanted)
        other.close()


def many() -> list[Work]:
    """More than `MOST` tokens, of several requests: decodes of what `before` has computed, and whole prompts."""
    decodes = [work(TOKENS[40:41], 40, id=f"decode {i}", first_block=4 * i) for i in range(3)]
    return decodes + [work(TOKENS[:70], id=f"prompt {i}", first_block=12 + 4 * i) for i in range(4)]


def before() -> list[Work]:
    return [work(TOKENS[:40], id=f"decode {i}", first_block=4 * i) for i in range(3)]


def test_more_tokens_than_at_once_are_computed_in_parts(plain):
    executor = OpenVINOExecutor(open_checkpoint(plain), kv_bytes=KV)
    exact = OpenVINOExecutor(open_checkpoint(plain), weights="f32", kv="f32", kv_bytes=KV)
    executor.few = 1000
    for each in (executor, exact):
        each.logits(before())
    wanted, found = exact.logits(many()), executor.logits(many())
    assert np.abs(found - wanted).mean() < CLOSE * wanted.std()
    whole = executor._packed(many())
    last = np.array([sum(w.count for w in many()) - 1, 0, 130], np.int32)
    assert executor._few is not None
    assert np.array_equal(executor._few.logits(whole | {"sampled_rows": last}), found[last])
    executor.few = 0
    assert np.abs(found - executor.logits(many())).max() > 0  # it was no graph's
    executor.close()
    exact.close()


def test_all_is_served_while_weights_are_packed(plain, executor, monkeypatch):
    begun, go_on, warm_up = threading.Event(), threading.Event(), OpenVINOExecutor._warm_up

    def slow(self, *arguments, **more) -> None:
        begun.set()
        go_on.wait()
        warm_up(self, *arguments, **more)

    monkeypatch.setattr(OpenVINOExecutor, "_warm_up", slow)
    later = OpenVINOExecutor(open_checkpoint(plain), kv_bytes=KV, packs="later")
    begun.wait()
    later.few, executor.few = 0, 1000
    for each in (later, executor):
        each.logits(before())
    assert np.array_equal(later.logits(many()), executor.logits(many()))
    settled = threading.Thread(target=later.settle)
    settled.start()
    assert settled.is_alive()  # the graph's weights are not packed
    go_on.set()
    settled.join()
    executor.few = 0
    # The graph reads what came without it, and nothing else was written there to pack the weights.
    rest = [work(TOKENS[70:72], 70, id="prompt 3", first_block=24)]
    assert np.array_equal(later.logits(rest), executor.logits(rest))
    executor.few = USUAL
    later.close()


def test_a_graph_that_never_packs_computes_nothing(plain, executor, monkeypatch):
    monkeypatch.setattr(OpenVINOExecutor, "_pack_weights", lambda self: pytest.fail("weights are packed"))
    monkeypatch.setattr("stallfree.executors.openvino.executor._infer", lambda *_: pytest.fail("the graph computes"))
    monkeypatch.setattr("stallfree.executors.openvino.few.suited.memory", lambda: Room(1 << 20, 1 << 21, "cgroup"))
    never = OpenVINOExecutor(open_checkpoint(plain), kv_bytes=KV, packs="never")
    assert (never.few, never.most_few) == (0, 0)  # there is nothing to calibrate
    never.settle()
    executor.few = 1000
    for each in (never, executor):
        each.logits(before())
    assert np.array_equal(never.logits(many()), executor.logits(many()))
    executor.few = USUAL
    never.close()


def test_without_a_graph_converted_weights_are_kept_whole(plain, executor, tmp_path):
    made: list[int] = []
    for _ in range(2):
        never = OpenVINOExecutor(
            open_checkpoint(plain), kv_bytes=KV, packs="never", folder=tmp_path, progress=lambda done, of: made.append(of - done)
        )
        executor.few = MOST
        assert np.array_equal(never.logits([work(TOKENS)]), executor.logits([work(TOKENS)]))
        executor.few = USUAL
        never.close()
        assert made.count(0) == 1  # the second start converts nothing
        assert [file.suffix for file in tmp_path.iterdir()] == [".kept"]


@pytest.mark.parametrize("form", ["int8", "file"])
def test_adapters_have_a_graph_though_the_model_has_none(form, plain, tmp_path):
    write_gguf(tmp_path / "model.gguf", open_checkpoint(plain), "Q4_0")
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    adapter = open_adapter(made_adapter(tmp_path / "adapter", checkpoint.config), checkpoint.config)
    base, adapted = [work(TOKENS)], [work(TOKENS)._replace(adapter="a")]
    found = []
    for packs in ("now", "never"):
        executor = OpenVINOExecutor(checkpoint, weights=form, kv_bytes=1 << 23, packs=packs)
        executor.few = 0
        before = executor.logits(base)
        executor.load_adapter("a", adapter, tuple(range(20, 20 + executor.adapter_blocks(adapter))))
        found.append(executor.logits(adapted))
        assert np.array_equal(executor.logits(base), before)
        executor.close()
    assert np.array_equal(*found)  # the same graph
    assert np.abs(found[0] - before).mean() > CLOSE * before.std()


@pytest.mark.parametrize("packs", ["later", "never"])
@pytest.mark.parametrize("kv", ["u8", "f32"])
def test_without_few_tokens_weights_are_packed_at_once(kv, packs, plain, monkeypatch):
    monkeypatch.setattr("stallfree.executors.openvino.executor.few_tokens", lambda *_: None)
    made = OpenVINOExecutor(open_checkpoint(plain), kv=kv, kv_bytes=KV, packs=packs)
    assert made._packing is None
    assert made.logits([work(TOKENS[:1])]).shape == (1, 160)
    made.close()


def test_what_it_cannot_do_is_said(plain, monkeypatch):
    checkpoint = open_checkpoint(plain)
    assert obstacle(checkpoint, "int8", "u8") == obstacle(checkpoint, "file", "u8") == ""
    assert "not 'f32' with 'u8'" in obstacle(checkpoint, "f32", "u8")
    assert "not 'int8' with 'bf16'" in obstacle(checkpoint, "int8", "bf16")
    changes = {"a head has 24": {"head_dim": 24}, "the hidden state 100": {"hidden_size": 100}, "mixtures": {"family": "gpt_oss"}}
    for said, change in changes.items():
        assert said in obstacle(replace(checkpoint, config=replace(checkpoint.config, **change)), "int8", "u8")
    monkeypatch.setattr("stallfree.executors.openvino.few.suited.memory", lambda: Room(1 << 20, 1 << 21, "cgroup"))
    assert "a second copy" in obstacle(checkpoint, "int8", "u8")
    assert obstacle(checkpoint, "int8", "u8", copies=1) == ""
    monkeypatch.setattr("sys.platform", "darwin")
    assert "this is darwin" in obstacle(checkpoint, "int8", "u8")


def test_groups_that_no_kernel_knows_take_the_graph(plain, monkeypatch):
    monkeypatch.setattr("stallfree.executors.openvino.few.forward._known", lambda *_: False)
    made = OpenVINOExecutor(open_checkpoint(plain), kv_bytes=KV)
    assert (made.few, made.most_few) == (0, 0)
    assert made.logits([work(TOKENS[:1])]).shape == (1, 160)
    made.close()


@pytest.mark.parametrize(("failures", "found"), [(1, True), (2, False)])
def test_what_cannot_be_compiled_or_kept_is_compiled_again_or_done_without(failures, found, monkeypatch, caplog):
    calls, forgotten = [], []

    def made(*args, kept):
        calls.append(kept)
        if len(calls) <= failures:
            raise OSError(28, "No space left on device")
        return "made"

    monkeypatch.setattr(forward, "FewTokens", made)
    monkeypatch.setattr(forward, "KEEPS", True)
    monkeypatch.setattr(forward, "forget", lambda: forgotten.append(True))
    assert (forward.few_tokens("source", "config") is not None) is found
    assert calls == [True, False]
    assert len(forgotten) == caplog.text.count("No space left on device") == failures


DAMAGED = """
from pathlib import Path
from stallfree.checkpoint import open_checkpoint
from stallfree.executors.openvino import OpenVINOExecutor
said = []
made = OpenVINOExecutor(open_checkpoint(Path({!r})), kv_bytes=1 << 21, compiling=lambda: said.append("compiles"))
print(*said, made.most_few)
"""


@pytest.mark.slow  # it compiles three times
def test_a_damaged_file_is_compiled_again(tmp_path):
    write_folder(tmp_path / "model", "llama")
    command, env = [sys.executable, "-c", DAMAGED.format(str(tmp_path / "model"))], {"STALLFREE_CACHE": str(tmp_path / "cache")}

    def started() -> tuple[str, str]:
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=True)
        return done.stdout.strip(), done.stderr

    assert started() == ("compiles 4", "")
    assert started() == ("4", "")
    for file in (tmp_path / "cache").rglob("*.nbi"):
        file.write_bytes(b"damaged")
    found, said = started()
    assert found == "4"
    assert "cannot be compiled, or kept" in said
    assert started()[0] == "compiles 4"
