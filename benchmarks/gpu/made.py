"""Shared by the parts of `gpu_all.py`: models with random weights, iterations, served requests, and errors.

Weights depend only on the tensor's name, so two processes, or a GPU and a processor, have the same model without a file.
"""

import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from stallfree.checkpoint import Checkpoint, ModelConfig
from stallfree.checkpoint.config import rotary_frequencies
from stallfree.checkpoint.dimensions import Dimensions
from stallfree.core.ledger import Limits
from stallfree.core.plan import Work
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.executors.base import Executor
from stallfree.policies import load

SMALL = Dimensions(
    name="small", family="llama", num_layers=4, hidden_size=512, num_heads=8, num_kv_heads=2, head_dim=64, ffn_size=1024,
    vocab_size=2048, max_model_len=1024,
)  # fmt: skip
TINY = replace(
    SMALL, name="tiny", num_layers=2, hidden_size=128, num_heads=4, head_dim=32, ffn_size=128, vocab_size=256, max_model_len=512
)
"""Small enough for a processor."""


class Absent(Exception):
    """The case cannot be run here; the message says what it needs."""


def need_cuda(device: str) -> None:
    if device != "cuda":
        raise Absent("needs cuda")


def config_of(model: Dimensions, **changes: Any) -> ModelConfig:
    """The configuration of a llama with these dimensions, with `changes`."""
    config = ModelConfig(
        **asdict(model) | {"family": "llama", "max_model_len": max(model.max_model_len, 512)},
        norm_eps=1e-5,
        inv_freq=rotary_frequencies(model.head_dim, 10000.0, {}, model.name),
        windows=(0,) * model.num_layers,
    )
    return replace(config, **changes)


def checkpoint(config: ModelConfig, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Checkpoint:
    """A model with random weights. They are drawn on `device`, in `dtype`, when they are read, and scaled so that products keep
    the size of their inputs.
    """
    shapes = config.tensors()

    def read(name: str) -> Any:
        shape, seed = shapes[name], zlib.crc32(name.encode())
        values = torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device, dtype=dtype)
        if len(shape) == 1:
            return 0.1 * values + (1 if "norm" in name or "ln_" in name else 0)
        return values if "embed" in name else values * shape[1] ** -0.5

    return Checkpoint(Path("random"), config, read, None)


def iteration(shape: Sequence[tuple[int, int]], vocab: int = 1, block: int = 16, scattered: bool = True) -> tuple[list[Work], int]:
    """Work with `start` and `count` as in `shape`, random tokens and its own blocks; and the number of blocks."""
    draw = torch.Generator().manual_seed(1)
    needed = [-(-(start + count) // block) for start, count in shape]
    numbers = torch.randperm(sum(needed), generator=draw).tolist() if scattered else list(range(sum(needed)))
    pieces = []
    for i, (start, count) in enumerate(shape):
        own, numbers = tuple(numbers[: needed[i]]), numbers[needed[i] :]
        tokens = tuple(torch.randint(vocab, (count,), generator=draw).tolist())
        pieces.append(Work(str(i), start, count, True, count == 1, tokens, own, None, "", (), ()))
    return pieces, sum(needed)


def requests(prompts: Sequence[Sequence[int]], number: int, samplings: Sequence[object]) -> list[Request]:
    """A request for each prompt, of `number` output tokens each; `samplings` are used in turn."""
    return [
        Request(str(i), list(prompt), number, arrival=i, sampling=samplings[i % len(samplings)]) for i, prompt in enumerate(prompts)
    ]


def served(executor: Executor, requests: Sequence[Request], budget: int = 512, at_once: int = 64) -> list[list[int]]:
    """The output tokens of each request; at most `at_once` run at a time, in iterations of `budget` tokens."""
    scheduler = Scheduler(load("sarathi", token_budget=budget), executor.capacity, Limits(at_once, 2048), reuse=False)
    for request in requests:
        scheduler.submit(request)
    out: deque[Any] = deque()
    while True:
        while len(out) < executor.capacity.depth and (plan := scheduler.schedule(0.0)).work:
            out.append(plan)
            executor.submit(plan)
        if not out:
            return [list(request.output) for request in requests]
        scheduler.complete(out.popleft(), executor.collect(), 0.0)


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The worst row's |result - expected| over |expected|, in float64; NaN if anything is."""
    result, expected = (x.detach().cpu().double().flatten(0, -2) for x in (result, expected))
    apart = (result - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-12)
    return float(apart.max())
