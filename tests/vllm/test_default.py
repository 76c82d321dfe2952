"""The policy `vllm-v1` decides as vLLM's own scheduler does, iteration by iteration."""

import random

import pytest
from vllm.v1.core.sched.scheduler import Scheduler as Vllm

from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity, StepResult
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.policies.vllm_v1 import VllmV1
from tests.vllm.real import BLOCK, LONGEST, Runner, model_folder, request, scheduler

ITERATIONS = 1000


def arrivals(seed: int, rate: float) -> list[list[tuple[str, list[int], int]]]:
    """For each iteration the requests that come before it; a third share a prefix."""
    rng, shared = random.Random(seed), list(range(800))
    comes: list[list[tuple[str, list[int], int]]] = []
    for i in range(ITERATIONS):
        here = []
        while rng.random() < rate:
            own = [1000 + rng.randrange(40_000) for _ in range(rng.choice([3, 40, 150, 700, 2500]))]
            prompt = (shared[: rng.choice([160, 400, 800])] if rng.random() < 0.3 else []) + own
            here.append((f"r{i}-{len(here)}", prompt, rng.randint(1, 120)))
        comes.append(here)
    return comes


@pytest.mark.parametrize(
    ("blocks", "seqs", "tokens", "threshold", "caching"),
    [
        (4000, 64, 512, 0, False),
        (4000, 64, 512, 0, True),  # with caching only while KV lasts: the two evict cached blocks in another order
        (4000, 32, 256, 100, True),
        (700, 64, 2048, 0, False),
        (700, 16, 256, 100, False),
        (300, 8, 4096, 0, False),
    ],
)
def test_a_thousand_iterations_are_the_same(tmp_path, blocks, seqs, tokens, threshold, caching):
    theirs = scheduler(Vllm, model_folder(tmp_path), blocks=blocks, seqs=seqs, tokens=tokens, threshold=threshold, caching=caching)
    runner = Runner(theirs)
    ours = Scheduler(
        VllmV1(tokens, threshold), Capacity(BLOCK, blocks, LONGEST), Limits(seqs, tokens, watermark=0.0), reuse=caching
    )
    busy = preempted = 0
    for i, here in enumerate(arrivals(blocks + tokens, 0.15)):
        for id, prompt, most in here:
            if len(prompt) + most > min(LONGEST, blocks * BLOCK):
                continue
            theirs.add_request(request(id, prompt, most, arrival=float(i)))
            ours.submit(Request(id, prompt, most, arrival=float(i)))
        plan = ours.schedule(float(i))
        runner.step()
        assert runner.shapes[-1] == {work.id: work.count for work in plan.work}, f"iteration {i}"
        if plan.work:
            busy += 1
            preempted += len(plan.preempted)
            ours.complete(plan, StepResult(plan.step, {w.id: [w.start + w.count] for w in plan.work if w.samples}, 0.0), float(i))
    assert busy > 900
    assert (preempted > 0) == (blocks < 1000)
