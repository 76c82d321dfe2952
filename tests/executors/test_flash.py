"""What FlashInfer is given leads to our attention's result, by a stand-in that computes it; and which is chosen. No GPU."""

import logging
import sys
import types

import pytest

from stallfree.checkpoint import open_checkpoint
from tests.executors.test_kernels import SHAPES, batch
from tests.executors.test_openvino import TOKENS, work
from tests.models import write_folder

torch = pytest.importorskip("torch")

from stallfree.executors.torch import Options, TorchExecutor  # noqa: E402
from stallfree.executors.torch import flash as module  # noqa: E402
from stallfree.executors.torch.attention import reference  # noqa: E402
from stallfree.executors.torch.flash import Flash, choose  # noqa: E402

CPU = torch.device("cpu")
KEYS = torch.zeros(64, 16, 2, 32, dtype=torch.bfloat16)


class Wrapper:
    """Stands in for flashinfer-python 0.7.2.post1, as far as it is used. Like the original it forgets a plan at the next one."""

    wrappers: list["Wrapper"]

    def __init__(self, float_workspace_buffer, kv_layout="NHD"):
        assert kv_layout == "NHD"
        assert float_workspace_buffer.dtype == torch.uint8
        self.plans = 0
        self.wrappers.append(self)

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim_qk,
        page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False, pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None, rope_scale=None, rope_theta=None,
        q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        numbers = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert {torch.int32} == {of.dtype for of in numbers}
        assert paged_kv_indptr[-1] == len(paged_kv_indices)
        assert causal
        self.plans += 1
        self.begins, self.blocks, self.numbers, self.filled = (of.tolist() for of in numbers)
        self.shape, self.page = (num_qo_heads, num_kv_heads, head_dim_qk), page_size
        self.scale, self.left, self.types = sm_scale, window_left, (q_data_type, kv_data_type)

    def run(self, q, paged_kv_cache):
        keys, values = paged_kv_cache
        assert self.types == (q.dtype, keys.dtype)
        assert self.shape == (q.shape[1], *keys.shape[2:])
        assert self.page == keys.shape[1]
        out = torch.empty_like(q)
        for i, filled in enumerate(self.filled):
            rows = slice(self.begins[i], self.begins[i + 1])
            pages = self.numbers[self.blocks[i] : self.blocks[i + 1]]
            length = (len(pages) - 1) * self.page + filled
            k, v = (
                of[pages].flatten(0, 1)[:length].repeat_interleave(q.shape[1] // of.shape[2], 1).float() for of in (keys, values)
            )
            at = torch.arange(length)
            position = torch.arange(length)[length - len(q[rows]) :, None]
            seen = at <= position
            if self.left >= 0:
                seen &= at >= position - self.left
            scores = torch.einsum("qhd,khd->hqk", q[rows].float(), k) * self.scale
            shares = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            out[rows] = torch.einsum("hqk,khd->qhd", shares, v).to(q.dtype)
        return out


@pytest.fixture
def wrappers(monkeypatch):
    """Installs the stand-in, and gives the wrappers that are created of it."""
    wrappers: list[Wrapper] = []
    monkeypatch.setattr(Wrapper, "wrappers", wrappers, raising=False)
    monkeypatch.setattr(module, "WORKSPACE", 16)
    stand_in = types.ModuleType("flashinfer")
    stand_in.BatchPrefillWithPagedKVCacheWrapper = Wrapper
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    return wrappers


def tensors(of, heads, kv_heads, size):
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(len(of.tokens), heads, size, generator=generator)
    return query, *(torch.randn(64, 16, kv_heads, size, generator=generator) for _ in range(2))


@pytest.mark.parametrize("window", [0, 1, 25])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 32), (9, 3, 64), (8, 1, 16), (2, 2, 48)])
@pytest.mark.parametrize("name", SHAPES)
def test_what_is_planned_gives_what_our_attention_gives(wrappers, name, heads, kv_heads, size, window):
    of = batch(SHAPES[name], CPU)
    query, keys, values = tensors(of, heads, kv_heads, size)
    result = Flash(heads, keys, {window}).plan(of)(query, keys, values, window)
    torch.testing.assert_close(result, reference(query, keys, values, of, window), rtol=1e-4, atol=1e-4)


def test_each_window_of_a_model_has_its_own_plan(wrappers):
    of = batch(SHAPES["hybrid"], CPU)
    query, keys, values = tensors(of, 4, 2, 32)
    planned = Flash(4, keys, {0, 25}).plan(of)
    for window in (0, 25, 0):
        expected = reference(query, keys, values, of, window)
        torch.testing.assert_close(planned(query, keys, values, window), expected, rtol=1e-4, atol=1e-4)


def test_two_plans_may_be_under_way(wrappers):
    batches = [batch(SHAPES["chunks"], CPU), batch(SHAPES["hybrid"], CPU)]
    flash = Flash(4, KEYS.float(), {0})
    plans = [flash.plan(of) for of in batches]
    for of, planned in zip(batches, plans, strict=True):
        inputs = tensors(of, 4, 2, 32)
        torch.testing.assert_close(planned(*inputs, 0), reference(*inputs, of, 0), rtol=1e-4, atol=1e-4)


def test_two_wrappers_take_turns(wrappers):
    flash = Flash(4, KEYS, {0})
    plans = []
    for _ in range(4):
        flash.plan(batch(SHAPES["hybrid"], CPU))
        plans.append([wrapper.plans for wrapper in wrappers])
    assert [[1, 0], [1, 1], [2, 1], [2, 2]] == plans


def times(triton, flashinfer):
    """A timer that runs what it is to time, and reports these seconds in turn."""
    durations = iter((triton, flashinfer))

    def time(run):
        run()
        return next(durations)

    return time


@pytest.mark.parametrize(("triton", "flashinfer", "taken"), [(2.0, 1.0, True), (1.0, 2.0, False), (1.0, 1.0, False)])
def test_flashinfer_is_taken_if_it_is_faster(wrappers, caplog, triton, flashinfer, taken):
    assert taken == isinstance(choose(4, torch.bfloat16, KEYS, {0}, 256, times(triton, flashinfer)), Flash)
    best = "FlashInfer" if taken else "Triton"
    assert [f"attention by {best}; in a trial Triton took {triton:.3f} ms, FlashInfer took {flashinfer:.3f} ms"] == caplog.messages


def test_a_model_shorter_than_the_trial_has_a_shorter_one(wrappers):
    assert choose(4, torch.bfloat16, KEYS, {0}, 20, times(2.0, 1.0)) is not None


@pytest.mark.parametrize("where", ["__init__", "plan", "run"])
def test_flashinfer_is_passed_over_if_it_raises(wrappers, monkeypatch, caplog, where):
    def broken(self, *args, **options):
        raise RuntimeError("no nvcc")

    monkeypatch.setattr(Wrapper, where, broken)
    assert choose(4, torch.bfloat16, KEYS, {0}, 256, times(2.0, 1.0)) is None
    assert ["FlashInfer is installed, but not used: RuntimeError: no nvcc"] == caplog.messages


def test_flashinfer_is_passed_over_if_something_that_it_needs_is_not_there(monkeypatch, caplog, tmp_path):
    (tmp_path / "flashinfer.py").write_text("import something_that_it_needs")
    monkeypatch.delitem(sys.modules, "flashinfer", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert choose(4, torch.bfloat16, KEYS, {0}, 256, times(2.0, 1.0)) is None
    assert "something_that_it_needs" in caplog.text


def test_flashinfer_is_passed_over_if_it_computes_something_else(wrappers, monkeypatch, caplog):
    run = Wrapper.run
    monkeypatch.setattr(Wrapper, "run", lambda self, q, caches: run(self, q, caches) + 1)
    assert choose(4, torch.bfloat16, KEYS, {0}, 256, times(2.0, 1.0)) is None
    assert "from ours" in caplog.text


@pytest.mark.parametrize(
    ("dtype", "kv"),
    [(torch.bfloat16, torch.float8_e4m3fn), (torch.float32, torch.float32), (torch.float16, torch.bfloat16)],
)
def test_fp8_f32_and_types_that_differ_stay_with_ours(wrappers, dtype, kv):
    assert choose(4, dtype, KEYS.to(kv), {0}, 256, times(2.0, 1.0)) is None
    assert [] == wrappers


def test_without_flashinfer_nothing_is_said(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with caplog.at_level(logging.DEBUG):
        assert choose(4, torch.bfloat16, KEYS, {0}, 256, times(2.0, 1.0)) is None
    assert [] == caplog.messages


def test_a_model_that_runs_with_it_gives_the_same_logits(wrappers, tmp_path):
    write_folder(tmp_path, "qwen2", use_sliding_window=True, sliding_window=20, max_window_layers=1)
    checkpoint = open_checkpoint(tmp_path)
    executor = TorchExecutor(checkpoint, Options("f32", "f32"), 1 << 22)
    pieces = [work(TOKENS[:40]), work(TOKENS[:33], first_block=3)]
    pieces = [piece._replace(blocks=tuple(range(3 * i, 3 * i + 3))) for i, piece in enumerate(pieces)]
    later = [pieces[0]._replace(start=40, count=1, tokens=(7,)), pieces[1]._replace(start=33, count=5, tokens=(8,) * 5)]
    expected = [executor.logits(pieces), executor.logits(later)]
    runner = executor._runner
    runner._flash = Flash(runner._model.num_heads, runner._cache[0][0], set(checkpoint.config.windows))
    for plan, logits in zip((pieces, later), expected, strict=True):
        torch.testing.assert_close(torch.tensor(executor.logits(plan)), torch.tensor(logits), rtol=1e-4, atol=1e-3)
    assert [1, 1, 1, 1] == [wrapper.plans for wrapper in wrappers]
