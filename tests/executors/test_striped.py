"""Groups of ranks that share the tokens of each request compute what one rank computes, however the tokens are cut and batched."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from stallfree.checkpoint import open_checkpoint
from stallfree.core.plan import Capacity, Plan, Work
from stallfree.executors.base import Lost
from tests.models import write_folder

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from stallfree.executors.torch import ParallelExecutor, TorchExecutor
from stallfree.executors.torch import striped as striped_attention
from stallfree.executors.torch.adapters import BLOCK
from stallfree.executors.torch.driver import Local
from stallfree.executors.torch.parallel import Alone
from stallfree.executors.torch.runner import Runner
from stallfree.executors.torch.striped import Groups, pack_stripes
from tests.executors.test_openvino import GPT_OSS, TOKENS, work
from tests.executors.test_parallel import EXACT, KV, SHAPES, handed_over, served

LENGTH = 100
FAMILIES = {
    "llama": ("llama", {}),
    "window": ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 20}),
    "sinks": ("gpt_oss", GPT_OSS),
}


class Threads(Groups):
    """Groups of one process: each is a thread. `meet` is where all wait for each other; `table` is what they leave there."""

    def __init__(self, number, size, meet, table):
        self.number, self.size, self._meet, self._table = number, size, meet, table

    def _exchanged(self, values):
        self._table[self.number] = values.clone()
        self._meet.wait()
        everything = dict(self._table)
        self._meet.wait()
        return everything

    def gather(self, own, each):
        everything = self._exchanged(own)
        assert list(each) == [len(everything[number]) for number in range(self.size)]
        return torch.cat([everything[number] for number in range(self.size)])

    def passed(self, values, into):
        into.copy_(self._exchanged(values)[(self.number - 1) % self.size])
        return []


class Ring:
    """`size` groups of one process, with room for 8 blocks each."""

    def __init__(self, checkpoint, size):
        self.meet, table = threading.Barrier(size), {}
        self.block = BLOCK * size
        self.runners = [
            Runner(
                checkpoint, EXACT, Alone(), range(checkpoint.config.num_layers), torch.device("cpu"),
                Threads(n, size, self.meet, table) if size > 1 else None,
            )
            for n in range(size)
        ]  # fmt: skip
        for runner in self.runners:
            runner.allocate(24)

    def run(self, pieces):
        """Logits of all tokens of the pieces: (name, start, tokens)."""
        each = 24 // 3
        plan = [
            Work(
                name, start, len(tokens), True, False, tuple(tokens),
                tuple(range(each * int(name), each * int(name) + -(-(start + len(tokens)) // self.block))), None, "", (), (),
            )
            for name, start, tokens in pieces
        ]  # fmt: skip
        rows = list(range(sum(w.count for w in plan)))

        def run(runner):
            try:
                return runner.run(plan, rows)
            except BaseException:
                self.meet.abort()  # the others wait for this one
                raise

        with ThreadPoolExecutor(len(self.runners)) as pool:
            first, *others = list(pool.map(run, self.runners))
        assert not any(len(logits) for logits in others)
        return first.numpy()


@pytest.fixture(scope="module", params=FAMILIES)
def rings(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("striped")
    family, config = FAMILIES[request.param]
    write_folder(folder, family, **config)
    checkpoint = open_checkpoint(folder)
    return {size: Ring(checkpoint, size) for size in (1, 2, 3, 4)}


SAME = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
"""The same examples in each run."""


@st.composite
def iterations(draw):
    """Iterations with pieces of up to three requests, each of which goes on where it was, or begins again from a cached part."""
    done, plans = dict.fromkeys("012", 0), []
    for _ in range(draw(st.integers(1, 6))):
        plan = []
        for name in draw(st.sets(st.sampled_from("012"), min_size=1)):
            start = done[name] if done[name] < LENGTH else draw(st.integers(0, LENGTH - 1))
            count = draw(st.one_of(st.just(1), st.integers(1, LENGTH - start)))
            plan.append((name, start, [(17 * int(name) + 7 * p) % 150 + 3 for p in range(start, start + count)]))
            done[name] = start + count
        plans.append(plan)
    return plans


@SAME
@given(plans=iterations(), size=st.sampled_from((2, 3, 4)))
def test_any_split_of_the_tokens_gives_the_logits_of_one_rank(rings, plans, size):
    for plan in plans:
        assert np.abs(rings[1].run(plan) - rings[size].run(plan)).max() < 1e-4


class Flash:
    """Torch's flash attention, which needs a GPU, as its kernels define it."""

    @staticmethod
    def chunk(query, key, value, before):
        last = torch.arange(query.shape[1])[:, None] + key.shape[1] - query.shape[1]
        keys = torch.arange(key.shape[1])
        visible = (keys <= last) & ((keys >= last - before) | (before < 0))
        return striped_attention.attention(query, key, value, visible[None])

    @staticmethod
    def decodes(query, key, value, lengths):
        visible = torch.arange(key.shape[1]) < lengths[:, None, None]
        return striped_attention.attention(query[:, None], key, value, visible)


@SAME
@given(plans=iterations(), size=st.sampled_from((2, 3, 4)))
def test_what_flash_attention_is_told_to_see_gives_the_logits_of_one_rank(rings, plans, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(striped_attention, "flash_takes", lambda query: True)
        patch.setattr(striped_attention, "flash", Flash.chunk)
        patch.setattr(striped_attention, "flash_decodes", Flash.decodes)
        for plan in plans:
            assert np.abs(rings[1].run(plan) - rings[size].run(plan)).max() < 1e-4


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_what_flash_attention_is_told_to_see_is_right_for_the_smallest_windows(window, monkeypatch):
    monkeypatch.setattr(striped_attention, "flash_takes", lambda query: True)
    monkeypatch.setattr(striped_attention, "flash", Flash.chunk)
    generator = torch.Generator().manual_seed(1)
    for number in range(4):
        groups = Threads(number, 4, None, {})
        batch, own = pack_stripes(groups, [work(TOKENS[:9], start=10)], [], Capacity(4, 9, 100), torch.device("cpu"))
        query, key, value = (torch.randn(1, n, 2, 8, generator=generator) for n in (own[0].count, 5, 5))
        for owner in range(4):
            result, sums = batch.striped._pass(query, key, value, 0, owner, window)
            visible = striped_attention.seen(owner + 4 * torch.arange(5), batch.positions[:, None], window)[None]
            expected, expected_sums = striped_attention.attention(query, key, value, visible)
            assert torch.allclose(expected, result, atol=1e-6)
            assert torch.allclose(expected_sums, sums, atol=1e-6)


def test_each_group_has_every_nth_token():
    groups = [Threads(number, 3, None, {}) for number in range(3)]
    for end in range(10):
        assert [len(range(number, end, 3)) for number in range(3)] == [group.held(end) for group in groups]
    piece = work(TOKENS[:7], start=4)
    assert [2, 3, 2] == [group.count(piece) for group in groups]  # positions 6, 9; 4, 7, 10; 5, 8


def striped(checkpoint, sp, tp=1, pp=1, **options):
    return ParallelExecutor(checkpoint, EXACT, KV, tp=tp, pp=pp, sp=sp, workers=Local(), **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("striped")
    write_folder(folder, "llama", num_hidden_layers=4)
    return open_checkpoint(folder)


@pytest.mark.parametrize("name", ["llama", "gpt oss", pytest.param("falcon", marks=pytest.mark.slow)])
def test_two_groups_give_the_same_tokens(name, tmp_path):
    family, config = SHAPES[name]
    write_folder(tmp_path, family, **config)
    checkpoint = open_checkpoint(tmp_path)
    executor = striped(checkpoint, 2)
    try:
        assert 2 * BLOCK == executor.capacity.block_size
        assert served(TorchExecutor(checkpoint, EXACT, KV)) == served(executor)
    finally:
        executor.close()


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp", "sp"), [(1, 1, 4), (2, 1, 2), (1, 2, 2)])
def test_groups_with_tensor_and_pipeline_parallelism_give_the_same_tokens(llama, tp, pp, sp):
    executor = striped(llama, sp, tp, pp)
    try:
        assert served(TorchExecutor(llama, EXACT, KV)) == served(executor)
        moved, kept = handed_over(executor, executor)
        assert moved == kept
    finally:
        executor.close()


def test_a_prompt_that_no_group_has_room_for_is_served_by_two(llama):
    alone = TorchExecutor(llama, EXACT, KV)
    prompt = [(7 * p) % 150 + 3 for p in range(200)]
    tight = 8 * alone.block_bytes  # 128 tokens
    plan = Plan(0, 0.0, (work(prompt)._replace(blocks=tuple(range(13))),))
    with pytest.raises(ValueError, match="block number is outside the 8 blocks"):
        TorchExecutor(llama, EXACT, tight).submit(plan)
    alone.submit(plan)
    executor = ParallelExecutor(llama, EXACT, tight, tp=1, pp=1, sp=2, workers=Local())
    try:
        executor.submit(Plan(0, 0.0, (work(prompt)._replace(blocks=tuple(range(7))),)))
        assert alone.collect().tokens == executor.collect().tokens
    finally:
        executor.close()


def test_a_rank_lost_in_the_middle_of_a_ring_is_replaced(llama):
    executor = striped(llama, 2, answer_s=20.0)
    try:
        plan = Plan(0, 0.0, (work(TOKENS[:20])._replace(blocks=(0, 1)),))
        executor.submit(plan)
        expected = executor.collect().tokens
        os.kill(executor._workers._processes[1].pid, signal.SIGSTOP)  # so that the ring stands still
        executor.submit(plan)
        os.kill(executor._workers._processes[1].pid, signal.SIGKILL)
        with pytest.raises(Lost, match="started again"):
            executor.collect()
        executor.submit(plan)
        assert expected == executor.collect().tokens
    finally:
        executor.close()


@pytest.mark.parametrize("sp", [0, -2])
def test_fewer_than_one_group_is_refused(llama, sp):
    with pytest.raises(ValueError, match=f"SP {sp}: tokens are spread over at least 1 group"):
        striped(llama, sp)
