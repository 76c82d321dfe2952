"""How long do an engine's iterations take, from scheduler to tokens, with overlap and without, and where does the host's time go?
Decodes of Llama 3 8B with random weights. KV takes the memory that a trial of the largest iteration leaves.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from gpu.facts import data_sheet
from gpu.made import TINY, checkpoint, config_of
from gpu.steps import Side, predicted

from stallfree.core.ledger import Limits
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.executors.sampling import GREEDY
from stallfree.executors.torch import Options, TorchExecutor
from stallfree.perf.shape import load
from stallfree.policies import load as policy

BUDGET = 2048
"""Tokens of an iteration, while prompts are prefilled."""


def cases(device: str, quick: bool) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    side = Side(load("llama3-8b") if device == "cuda" else TINY, device=device)
    sizes = (4,) if device == "cpu" else (32,) if quick else (32, 1, 128)
    ways = (("one at a time", False), ("overlap", True))
    return [(f"{side.name}, {n} decodes, {way}", partial(_engine, side, n, on)) for n in sizes for way, on in ways]


@cache
def _executor(side: Side) -> TorchExecutor:
    cuda = side.device == "cuda"
    model = checkpoint(config_of(side.model), side.device, torch.bfloat16 if cuda else torch.float32)
    options = Options(side.weights, side.kv, device=side.device, threads=1)
    return TorchExecutor(model, options, None if cuda else 1 << 24)


def _engine(side: Side, decodes: int, overlap: bool) -> dict[str, Any]:
    executor, prompt, number = _executor(side), side.context // 8, 100 if side.device == "cuda" else 8
    executor.capacity = replace(executor.capacity, depth=1 + overlap, overlap=overlap)
    taken = paced(executor, decodes, prompt, number, side.model.vocab_size)
    row: dict[str, Any] = {f"{name}, ms": 1e3 * statistics.median(times) for name, times in taken.items()}
    sheet = data_sheet(side.device)
    shape = [(prompt + number // 2, 1)] * decodes
    expected = None if sheet is None else predicted(side, shape, sheet, host=True)
    return row | {"predicted, ms": expected and 1e3 * expected, "KV blocks": executor.capacity.num_blocks}


def paced(executor: TorchExecutor, decodes: int, prompt: int, number: int, vocab: int) -> dict[str, list[float]]:
    """Seconds of `number` iterations of `decodes` each, from the end of one to the end of the next, and of their parts."""
    scheduler = Scheduler(policy("sarathi", token_budget=BUDGET), executor.capacity, Limits(decodes), reuse=False)
    prefills = -(-decodes * prompt // (BUDGET - decodes))
    for i in range(decodes):
        tokens = torch.randint(vocab, (prompt,)).tolist()
        # The first answer is as long as the prefills of all others and the measured iterations.
        scheduler.submit(Request(str(i), tokens, prefills + number + 20, sampling=GREEDY))
    seconds: dict[str, list[float]] = {"iteration": [], "scheduling": [], "submitting": [], "waiting": []}
    out: deque[Any] = deque()
    clock = time.perf_counter
    last = clock()
    scheduling = submitting = 0.0
    while len(seconds["iteration"]) < number:
        while len(out) < executor.capacity.depth:
            began = clock()
            plan = scheduler.schedule(began)
            planned = clock()
            if not plan.work:
                break
            executor.submit(plan)
            out.append(plan)
            scheduling, submitting = scheduling + planned - began, submitting + clock() - planned
        plan = out.popleft()
        waiting = clock()
        result = executor.collect()
        collected = clock()
        scheduler.complete(plan, result, collected)
        ended = clock()
        if plan.num_tokens == decodes == len(plan.work):
            parts = (ended - last, scheduling + ended - collected, submitting, collected - waiting)
            for times, taken in zip(seconds.values(), parts, strict=True):
                times.append(taken)
        last, scheduling, submitting = ended, 0.0, 0.0
    while out:
        out.popleft()
        executor.collect()
    return seconds
