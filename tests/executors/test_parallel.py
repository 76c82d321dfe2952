"""Ranks in several processes compute what one process does, and are started again when one is lost."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from stallfree.checkpoint import open_checkpoint
from stallfree.core.ledger import Limits
from stallfree.core.plan import Plan
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.executors.base import Lost
from stallfree.executors.sampling import Sampling
from stallfree.policies import load
from tests.executors.test_openvino import GPT_OSS, TOKENS, work
from tests.models import write_folder

pytest.importorskip("torch")
pytest.importorskip("transformers")

from stallfree.executors.torch import Options, ParallelExecutor, TorchExecutor
from stallfree.executors.torch.driver import Bubbles, Local
from stallfree.executors.torch.runner import stages
from stallfree.executors.torch.worker import join

KV = 1 << 22
EXACT = Options("f32", "f32")
SHAPES = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "gemma3": ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 20}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1], "layer_types": ["full_attention"] * 3}),
    "one KV head": ("llama", {"num_key_value_heads": 1}),
    "gpt oss": ("gpt_oss", GPT_OSS),
    "falcon": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "hidden_size": 128}),
}


def parallel(checkpoint, tp, pp, **options):
    return ParallelExecutor(checkpoint, EXACT, KV, tp=tp, pp=pp, workers=Local(), **options)


def served(executor):
    """The tokens of a few requests, greedy and sampled, some longer than an iteration."""
    scheduler = Scheduler(load("sarathi", token_budget=48), executor.capacity, Limits(8, 512))
    requests = [
        Request(
            str(i), [(7 * i + 3 * j) % 150 + 3 for j in range(length)], 12, sampling=Sampling(temperature=i % 2, seed=i, logprobs=2)
        )
        for i, length in enumerate((3, 90, 40, 17))
    ]
    for request in requests:
        scheduler.submit(request)
    out = []
    while True:
        while len(out) < executor.capacity.depth and (plan := scheduler.schedule(0.0)).work:
            out.append(plan)
            executor.submit(plan)
        if not out:
            break
        plan = out.pop(0)
        result = executor.collect()
        assert (None, {}) == (result.error, dict(result.failed))
        scheduler.complete(plan, result, 0.0)
    return [request.output for request in requests]


def ran(executor, step, start, tokens, blocks):
    """The token that follows `tokens`, which begin at `start`."""
    piece = work(tokens)._replace(start=start, blocks=blocks)
    executor.submit(Plan(step, 0.0, (piece,)))
    return executor.collect().tokens[piece.id]


def handed_over(a, b):
    """Tokens of a prompt that `a` computes and `b` goes on with, and those of `a` alone."""
    assert (a.layout, a.block_bytes) == (b.layout, b.block_bytes)
    source, target, size = (3, 1, 4), (2, 5, 0), 3 * a.block_bytes
    first = ran(a, 0, 0, TOKENS[:40], source)
    moved, again = bytearray(size), bytearray(size)
    a.read_blocks(source, memoryview(moved))
    b.write_blocks(target, memoryview(moved))
    b.read_blocks(target, memoryview(again))
    assert moved == again
    return [ran(executor, 1, 40, list(first), blocks) for executor, blocks in ((b, target), (a, source))]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    write_folder(folder, "llama", num_hidden_layers=4)
    return open_checkpoint(folder)


def test_norms_over_all_heads_are_refused_on_several_ranks(tmp_path):
    write_folder(tmp_path, "olmo2")
    with pytest.raises(ValueError, match="TP 2: olmo2 normalises all heads of a token together"):
        parallel(open_checkpoint(tmp_path), 2, 1)


@pytest.mark.parametrize("name", SHAPES)
def test_two_ranks_a_layer_give_the_same_tokens(name, tmp_path):
    family, config = SHAPES[name]
    write_folder(tmp_path, family, **config)
    checkpoint = open_checkpoint(tmp_path)
    alone = TorchExecutor(checkpoint, EXACT, KV)
    expected = served(alone)
    executor = parallel(checkpoint, 2, 1)
    try:
        assert expected == served(executor)
        for a, b in ((alone, executor), (executor, alone)):
            moved, kept = handed_over(a, b)
            assert moved == kept
    finally:
        executor.close()


@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 2)])
def test_stages_give_the_same_tokens_with_as_many_plans_out(llama, tp, pp):
    alone = TorchExecutor(llama, EXACT, KV)
    expected = served(alone)
    executor = parallel(llama, tp, pp)
    try:
        assert pp == executor.capacity.depth
        assert expected == served(executor)
        for a, b in ((alone, executor), (executor, alone)):
            moved, kept = handed_over(a, b)
            assert moved == kept
    finally:
        executor.close()


def test_stages_say_what_they_waited(llama):
    executor = parallel(llama, 1, 2)
    try:
        bubbles = []
        for step in range(3):
            executor.submit(Plan(step, 0.0, (work(TOKENS[:20])._replace(blocks=(0, 1)),)))
            bubbles.append(executor.collect().bubble_s)
        assert min(bubbles[1:]) > 0  # the second stage waits for the first in every iteration but the first one
    finally:
        executor.close()


def test_bubbles_are_what_stages_wait_while_there_is_work():
    bubbles = Bubbles(2)
    bubbles.submitted(0.0)
    assert 0.0 == bubbles.collected(0.0, 2.0)
    bubbles.submitted(5.0)  # both waited 3 s for nothing, the first one 1 s more for the second
    bubbles.submitted(5.5)
    assert pytest.approx(1.0) == bubbles.collected(7.0, 7.0)
    assert pytest.approx(0.25) == bubbles.collected(0.25, 8.0)


def test_what_one_iteration_waits_too_little_is_the_next_one_s():
    bubbles = Bubbles(2)
    bubbles.submitted(0.0)
    bubbles.collected(0.0, 1.0)
    bubbles.submitted(2.0)
    assert 0.0 == bubbles.collected(1.5, 3.0)
    bubbles.submitted(3.0)
    assert pytest.approx(0.5) == bubbles.collected(1.0, 4.0)


@contextmanager
def running(checkpoint):
    """An executor of two stages, and a plan that it ran. After the block it runs it as before, whatever it lost there."""
    executor = parallel(checkpoint, 1, 2, answer_s=3.0)
    try:
        plan = Plan(0, 0.0, (work(TOKENS[:20])._replace(blocks=(0, 1)),))
        executor.submit(plan)
        expected = executor.collect().tokens
        yield executor, plan
        executor.submit(replace(plan, step=1))
        assert expected == executor.collect().tokens
    finally:
        executor.close()


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hanging"])
def test_a_lost_rank_is_told_and_replaced(llama, signal_):
    with running(llama) as (executor, plan):
        os.kill(executor._workers._processes[1].pid, signal_)
        with pytest.raises(Lost, match="started again"):  # noqa: PT012  # it is seen in the one call or the other
            executor.submit(plan)
            executor.collect()


@pytest.mark.parametrize("move", ["read_blocks", "write_blocks"])
def test_a_rank_that_is_lost_while_kv_moves_is_told_by_the_next_plan(llama, move):
    with running(llama) as (executor, plan):
        os.kill(executor._workers._processes[1].pid, signal.SIGKILL)
        with pytest.raises(ConnectionError, match="KV could not be moved"):  # noqa: PT012  # a socket takes a message after its end
            while True:
                getattr(executor, move)([0, 1], memoryview(bytearray(2 * executor.block_bytes)))
        with pytest.raises(Lost, match="started again"):
            executor.submit(plan)


def test_a_plan_that_is_out_is_collected_behind_kv_that_moved(llama):
    executor = parallel(llama, 1, 2)
    try:
        plans = [Plan(step, 0.0, (work(TOKENS[:20])._replace(blocks=(2 * step, 2 * step + 1)),)) for step in range(2)]
        for plan in plans:
            executor.submit(plan)
        memory = memoryview(bytearray(4 * executor.block_bytes))
        executor.read_blocks([0, 1, 2, 3], memory)
        results = [executor.collect() for _ in plans]
        assert [0, 1] == [result.step for result in results]
        half = np.frombuffer(memory, np.uint8).reshape(8, 2, -1)
        assert (half[:, 0] == half[:, 1]).all()
        assert half.any()
    finally:
        executor.close()


def test_a_plan_that_cannot_run_harms_no_rank(llama):
    executor = parallel(llama, 2, 1)
    try:
        with pytest.raises(ValueError, match="vocabulary of 160"):
            executor.submit(Plan(0, 0.0, (work([1, 999])._replace(blocks=(0,)),)))
        executor.submit(Plan(1, 0.0, (work(TOKENS[:9])._replace(blocks=(0,)),)))
        assert 1 == executor.collect().step
    finally:
        executor.close()


@pytest.mark.parametrize(
    ("tp", "pp", "says"),
    [(3, 1, "TP 3 does not divide 4 heads, 2 KV heads and 192 FFN channels; it could be 1, 2, 4"), (1, 5, "PP 5 .* take 1 to 4")],
)
def test_what_does_not_divide_is_refused_before_anything_starts(llama, tp, pp, says):
    with pytest.raises(ValueError, match=says):
        parallel(llama, tp, pp)


def test_a_rank_says_why_it_cannot_start(llama):
    with pytest.raises(MemoryError, match="rank [01]: 100 bytes hold no block of KV"):
        ParallelExecutor(llama, EXACT, 100, tp=2, pp=1, workers=Local())


@pytest.mark.parametrize(
    ("number", "says"), [(0, "torch finds no GPU; take --device cpu"), (1, "2 ranks need 2 GPUs, and torch finds 1")]
)
def test_more_ranks_than_gpus_are_refused(llama, monkeypatch, number, says):
    monkeypatch.setattr("torch.cuda.device_count", lambda: number)
    with pytest.raises(ValueError, match=says):
        ParallelExecutor(llama, replace(EXACT, device="cuda"), KV, tp=2, pp=1, workers=Local())


def test_a_rank_that_cannot_reach_the_others_names_the_address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(RuntimeError, match=f"rank 1 could not meet the others at 127.0.0.1:{port} within 0:00:01"):
        join({"host": "127.0.0.1", "port": port, "timeout_s": 1, "rank": 1, "world": 2}, "gloo")


@pytest.mark.parametrize(("layers", "pp", "expected"), [(4, 2, [2, 2]), (5, 2, [3, 2]), (7, 3, [3, 2, 2]), (3, 1, [3])])
def test_stages_have_about_as_many_layers(layers, pp, expected):
    assert expected == [len(stage) for stage in stages(layers, pp)]


def test_ranks_placed_by_ray_do_the_same_and_are_replaced(llama, monkeypatch):
    ray = pytest.importorskip("ray")
    from stallfree.executors.torch import ray_workers, workers

    expected = served(TorchExecutor(llama, EXACT, KV))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    executor = None
    try:
        executor = ParallelExecutor(llama, EXACT, KV, tp=1, pp=2, workers=workers("ray"))
        assert expected == served(executor)
        ray.kill(executor._workers._actors[0])
        plan = Plan(0, 0.0, (work(TOKENS[:20])._replace(blocks=(0, 1)),))
        with pytest.raises(Lost, match="started again"):  # noqa: PT012  # Ray takes its time
            while True:
                executor.submit(plan)
                executor.collect()
        executor.submit(plan)
        assert 1 == len(executor.collect().tokens)
        monkeypatch.setattr(ray_workers, "PLACED_S", 0.5)
        with pytest.raises(RuntimeError, match="Ray found no room within 0.5 s for 4 stages of 1 CPU"):
            ParallelExecutor(llama, EXACT, KV, tp=1, pp=4, workers=workers("ray"))
    finally:
        if executor is not None:
            executor.close()
        ray.shutdown()


def test_workers_that_nobody_knows_are_named():
    from stallfree.executors.torch import workers

    with pytest.raises(ValueError, match="workers 'slurm' are unknown; known are local, ray"):
        workers("slurm")


def test_one_process_needs_no_msgpack_and_several_say_that_they_do():
    code = """
import sys
sys.modules["msgpack"] = None
from stallfree.executors.torch import TorchExecutor, workers
try:
    workers("local")
except ValueError as error:
    print(error)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "workers local need msgpack, which is not installed: pip install -e '.[torch]' in the checkout\n" == output
