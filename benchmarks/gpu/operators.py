"""Do fused operators and products of quantised weights match float64, and does sampling on the device match the host?"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu.attention import TYPES
from gpu.made import error

from stallfree.core.plan import Work
from stallfree.executors import sampling
from stallfree.executors.sampling import Sampling
from stallfree.executors.torch import fused
from stallfree.executors.torch.sampler import sample
from stallfree.executors.torch.weights import Matrix

LIMITS = {"bf16": 0.01, "fp16": 0.002, "f32": 1e-5}
"""The largest error: a rounding of each intermediate value, and of the result."""
PRODUCTS = {"bf16": 0.01, "fp16": 0.002, "f32": 1e-4}
CUTS = [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 8, "top_p": 0.8, "min_p": 0.05}, {"temperature": 0.5, "top_p": 0.9}]

Case = tuple[str, Callable[[], dict[str, Any]]]


def cases(device: str, quick: bool) -> list[Case]:
    small = device == "cpu"
    sizes = [(3, 4, 32)] if small else [(1, 32, 128), (5, 9, 64), (300, 32, 128), (8192, 71, 64), (7, 3, 96)]
    shapes = [(3, 72, 128)] if small else [(1, 4096, 4096), (3, 72, 128), (17, 28672, 4096), (64, 4096, 14336), (512, 6144, 4096)]
    rows = 400 if small else 4000
    cases: list[Case] = []
    for dtype in ("bf16", "f32") if small or quick else ("bf16", "fp16", "f32"):
        cases += [(f"fused, {dtype}, {t} x {h} x {s}", partial(_fused, device, dtype, t, h, s)) for t, h, s in sizes]
    for form in ("fp8", "int8", "int4"):
        named = [(f"product, {form}, {r} x {i} to {o}", partial(_product, device, form, "bf16", r, o, i)) for r, o, i in shapes]
        cases += named[:3] if quick else named
    cases += [(f"product, {form}, f32", partial(_product, device, form, "f32", 5, 72, 128)) for form in ("fp8", "int8", "int4")]
    cases += [("sampling, temperature", partial(_same, device, rows)), ("sampling, neighbours", partial(_alone, device, small))]
    return cases + [(f"sampling, {_words(how)}", partial(_spread, device, how, rows)) for how in CUTS]


def _fused(device: str, dtype: str, tokens: int, heads: int, size: int) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(TYPES[dtype])

    def double(*values: torch.Tensor) -> list[torch.Tensor]:
        return [value.cpu().double() for value in values]

    x, delta, weight = random(tokens, heads * size), random(tokens, heads * size), random(heads * size)
    parts = [(fused.add_norm(x, delta, weight, 1e-5), fused.add_norm(*double(x, delta, weight), 1e-5))]
    wide = random(tokens, 2 * heads * size)
    parts += [((fused.swiglu(wide),), (fused.swiglu(*double(wide)),))]
    whole = random(tokens, heads + 2, size)  # queries are a part of a wider tensor
    angles = 1000 * torch.rand(tokens, size // 2, generator=generator, device=device)
    turns = angles.cos(), angles.sin()
    slots = torch.randperm(16 * -(-tokens // 16), generator=generator, device=device)[:tokens]
    kept = []
    for values, angle in (([whole], turns), (double(whole), tuple(double(*turns)))):
        q, k, v = values[0].split([heads, 1, 1], 1)
        cache = tuple(q.new_zeros(-(-tokens // 16), 16, 1, size) for _ in range(2))
        kept.append((fused.keep(q, k, v, angle, cache, slots.to(q.device)), *(of.flatten(0, 2) for of in cache)))
    parts += [(kept[0], kept[1])]
    worst = [error(result, expected) for pair in parts for result, expected in zip(*pair, strict=True)]
    return {"error": float(np.max(worst)), "limit": LIMITS[dtype]}


def _product(device: str, form: str, dtype: str, rows: int, outs: int, ins: int) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(5)
    weight, x = (torch.randn(shape, generator=generator, device=device) for shape in ((outs, ins), (rows, ins)))
    x = x.to(TYPES[dtype])
    matrix = Matrix(weight, form, None)
    expected = x.double() @ matrix.dense(torch.float64).T
    return {"error": error(matrix(x), expected), "limit": PRODUCTS[dtype]}


def _work(row: int, how: Sampling) -> Work:
    return Work(str(row), row, 1, True, True, (0,), (0,), how, "", (1, 2), (3,))


def _words(how: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in how.items())


def _same(device: str, rows: int) -> dict[str, Any]:
    """The share of rows that get another token than on the host, because a cumulative share is near the request's random number."""
    logits = np.random.default_rng(7).normal(0, 2, (rows, 500)).astype(np.float32)
    works = [_work(i, Sampling(temperature=(0.0, 0.7, 1.3)[i % 3], seed=i)) for i in range(rows)]
    on_device, on_host = sample(torch.from_numpy(logits).to(device), works)[0], sampling.sample(logits, works)[0]
    return {"error": sum(on_device[id] != token for id, token in on_host.items()) / rows, "limit": 0.005}


def _alone(device: str, small: bool) -> dict[str, Any]:
    """The share of rows that get another token than in a batch of other requests."""
    vocab, rows = (500, 12) if small else (128256, 48)
    logits = torch.randn(rows, vocab, generator=torch.Generator(device).manual_seed(7), device=device)
    hows = [{}, {"top_k": 9}, {"min_p": 0.01}, {"temperature": 0}, {"top_p": 0.9}, {"logprobs": 1}]
    works = [_work(i, Sampling(**{"seed": i} | hows[i % len(hows)])) for i in range(rows)]
    alone = [sample(logits[i : i + 1], [work])[0][work.id] for i, work in enumerate(works)]
    both = sample(logits, works)[0]
    return {"error": sum(both[w.id] != token for w, token in zip(works, alone, strict=True)) / rows, "limit": 0.0}


def _spread(device: str, how: dict[str, Any], rows: int) -> dict[str, Any]:
    """Half the summed differences of the tokens' frequencies on device and host; 1 if an impossible token was sampled."""
    logits = np.repeat(np.random.default_rng(7).normal(0, 2, (1, 12)).astype(np.float32), rows, 0)
    works = [_work(i, Sampling(seed=i, **how)) for i in range(rows)]
    on_device, on_host = (
        Counter(token for (token,) in result[0].values())
        for result in (sample(torch.from_numpy(logits).to(device), works), sampling.sample(logits, works))
    )
    apart = sum(abs(on_device[token] - on_host[token]) for token in on_device | on_host) / 2 / rows
    return {"error": apart if on_device.keys() <= on_host.keys() else 1.0, "limit": 4 / rows**0.5}
